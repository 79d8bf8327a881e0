# SPDX-License-Identifier: BSD-3-Clause
"""``qefficient export``: base and adapters as one ONNX graph with the adapters as inputs."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from QEfficient.cloud.__main__ import run
from QEfficient.cloud.test import parse_adapters
from QEfficient.contract import ADAPTERS_DIR, MODEL_FILE
from QEfficient.options import option, parse


@dataclass(slots=True, kw_only=True)
class Options:
    """Export a base with its adapters to an ONNX graph of standard operators; the adapters' tensors are its inputs.

    The graph takes the structure of the first adapter. Every adapter that fits it is written beside it; the others are
    named, and need a graph of their own.
    """

    base: str = option(help="Folder or Hub id of the base model.", positional=True)
    adapter: list[str] = option(help="An adapter and its name; may be repeated.", metavar="NAME=PATH")
    output: Path | None = option(
        None, "Folder to export to; the graph's hash is appended. Default: in the cache.", metavar="DIR"
    )
    logits: str = option("last", "Logits of each row's last token, or of every position.", choices=["last", "all"])


def command(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = parse(Options, argv, prog="qefficient export")
    adapters = parse_adapters(options.adapter)
    from QEfficient.peft.unloaded import export_adapters

    folder = export_adapters(options.base, adapters, options.output, logits=options.logits)
    print(f"graph:    {folder / MODEL_FILE}")
    for name in adapters:
        written = folder / ADAPTERS_DIR / f"{name}.safetensors"
        print(f"adapter:  {name}: {written if written.is_file() else 'does not fit this graph; export it on its own'}")
    return 0


if __name__ == "__main__":
    sys.exit(run("export"))
