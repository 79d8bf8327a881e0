# SPDX-License-Identifier: BSD-3-Clause
"""``qefficient export``: base and adapters as one ONNX graph with the adapters as inputs."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from QEfficient.cloud.__main__ import run
from QEfficient.cloud.test import parse_adapters
from QEfficient.contract import ADAPTERS_DIR, MODEL_FILE
from QEfficient.errors import ConfigError
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
    merge: str | None = option(
        None, "Merge this adapter into the weights; the graph then has no adapter inputs.", metavar="NAME"
    )
    standalone: bool = option(False, "Write the weights beside the graph instead of linking the checkpoint's files.")
    without_weights: bool = option(
        False,
        "Make the graph from the base's configuration and model.safetensors.index.json alone. It cannot be run before it "
        "is exported again with the weights.",
    )
    adapter_format: str = option(
        "safetensors",
        "Form of the adapters beside the graph; onnx_adapter writes them for ONNX Runtime's LoraAdapter as well.",
        choices=["safetensors", "onnx_adapter"],
    )
    task: list[str] = option(
        [], "Task to take of an adapter that holds several (Poly, multitask prompts). Repeatable.", metavar="NAME=N"
    )


def command(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = parse(Options, argv, prog="qefficient export")
    adapters = parse_adapters(options.adapter)
    if options.merge is not None:
        return _merge(options, adapters)
    if options.standalone and options.without_weights:
        raise ConfigError("--standalone writes the weights, --without-weights leaves them out: choose one")
    from QEfficient.peft.unloaded import export_adapters

    folder = export_adapters(
        options.base,
        adapters,
        options.output,
        logits=options.logits,
        weights="written" if options.standalone else "absent" if options.without_weights else "linked",
        tasks=parse_tasks(options.task, adapters),
    )
    print(f"graph:    {folder / MODEL_FILE}")
    if options.without_weights:
        print("weights:  absent; export again without --without-weights when they are there")
    if options.adapter_format == "onnx_adapter":
        from QEfficient.peft.onnx_adapters import write_onnx_adapters

        graph, files = write_onnx_adapters(folder)
        print(f"for LoraAdapter: {graph}", *files, sep="\n                 ")
    for name in adapters:
        written = folder / ADAPTERS_DIR / f"{name}.safetensors"
        print(f"adapter:  {name}: {written if written.is_file() else 'does not fit this graph; export it on its own'}")
    return 0


def parse_tasks(given: Sequence[str], adapters: Mapping[str, str]) -> dict[str, int]:
    """Return tasks by adapter.

    Raises:
        ConfigError: Not of the form NAME=N, or no adapter of that name.
    """
    tasks = {}
    for text in given:
        name, _, number = text.partition("=")
        if name not in adapters or not number.isdecimal():
            raise ConfigError(f"--task takes NAME=N, a number for one of {', '.join(adapters)}, not {text!r}")
        tasks[name] = int(number)
    return tasks


def _merge(options: Options, adapters: Mapping[str, str]) -> int:
    name = str(options.merge)
    if list(adapters) != [name]:
        raise ConfigError(
            f"--merge {name} needs --adapter {name}=PATH, and no other adapter: a merged graph has no inputs for them"
        )
    if options.without_weights or options.task:
        raise ConfigError("--merge goes neither with --without-weights nor with --task: PEFT merges no such adapter")
    if options.adapter_format != "safetensors":
        raise ConfigError(
            f"--merge leaves no adapter beside the graph to write as --adapter-format {options.adapter_format}"
        )
    from QEfficient.peft.merged import export_merged

    folder = export_merged(options.base, name, adapters[name], options.output, logits=options.logits)
    print(f"graph:    {folder / MODEL_FILE}")
    print(f"adapter:  {name}: merged into the weights")
    return 0


if __name__ == "__main__":
    sys.exit(run("export"))
