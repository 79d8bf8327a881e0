# SPDX-License-Identifier: BSD-3-Clause
"""The ``qefficient`` command: picks a subcommand, prints errors as one line."""

import importlib
import os
import sys
from collections.abc import Sequence

from QEfficient.errors import QEffError
from QEfficient.options import suggest

COMMANDS = {
    "finetune": "train an adapter for a base model",
    "export": "write base and adapters as an ONNX graph",
    "compile": "lower a graph to a program for this machine",
    "generate": "complete a prompt with a base and an adapter",
    "serve": "serve a base and its adapters over HTTP",
    "test": "prove that adapters work, and measure them",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``qefficient <command> …`` and return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in {"-h", "--help"}:
        print(_usage())
        return 0 if args else 2
    if args[0] == "--version":
        from QEfficient import __version__

        print(__version__)
        return 0
    if args[0] not in COMMANDS:
        print(f"qefficient: unknown command {args[0]!r}{suggest(args[0], COMMANDS)}", file=sys.stderr)
        return 2
    return run(args[0], args[1:])


def run(command: str, argv: Sequence[str] | None = None) -> int:
    """Run one command; a QEffError becomes one line on stderr and exit code 2."""
    module = importlib.import_module(f"QEfficient.cloud.{command}")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries are not the user's business
    try:
        return int(module.command(list(sys.argv[1:] if argv is None else argv)))
    except QEffError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as e:  # no permission, no space, a file where a folder should be
        print(f"error: {e.strerror or e}" + f": {e.filename}" * (e.filename is not None), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _usage() -> str:
    lines = [
        "usage: qefficient COMMAND [options]",
        "",
        "Prove that a PEFT model works, and make it run fast.",
        "",
        "commands:",
    ]
    lines += [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    return "\n".join([*lines, "", "`qefficient COMMAND --help` shows a command's options."])


if __name__ == "__main__":
    sys.exit(main())
