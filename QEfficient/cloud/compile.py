# SPDX-License-Identifier: BSD-3-Clause
"""``qefficient compile``: a graph lowered to a program for this machine."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from QEfficient.cloud.__main__ import run
from QEfficient.cloud.progress import progress
from QEfficient.contract import MODEL_FILE, Manifest
from QEfficient.options import option, parse


@dataclass(slots=True, kw_only=True)
class Options:
    """Compile an exported graph to a program for this machine; a program that is there already is used again."""

    graph: Path = option(help="Folder of an exported graph, or its model.onnx.", positional=True)
    target: str = option(
        "onnxruntime",
        "What to compile for: onnxruntime, with kernels made for this CPU if there is a C++ compiler, or onnxruntime-plain, without.",
        metavar="NAME",
    )
    precision: str = option("fp32", "How the base's weights are held: fp32, bf16, int8 or int4.", metavar="TYPE")
    block_size: int | None = option(
        None,
        "Weights that share a scale: smaller is more exact and slower. Default: 32 for int4, 128 for int8 (64 or 32 where rows ask for it).",
    )
    zero_points: bool = option(
        False, "Give blocks a zero point (int8, int4): more exact where weights lean to one side."
    )
    keep: list[str] = option(
        [],
        "Weights that stay one step higher, by name or pattern: int8 in an int4 program, fp32 in an int8 one. Repeatable.",
        metavar="PATTERN",
    )
    batch_size: int | None = option(None, "Rows that will be used. Default: any.")
    prefill_seq_len: int = option(128, "Most tokens of a prompt in one call.")
    ctx_len: int | None = option(None, "Longest context, prompt and answer. Default: the base's own.")
    output: Path | None = option(None, "Folder to put the program into. Default: the graph's.", metavar="DIR")


def command(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = parse(Options, argv, prog="qefficient compile")
    from QEfficient.compile.program import compile_graph

    graph = options.graph.parent if options.graph.name == MODEL_FILE else options.graph
    with progress() as show:
        show("compiling", graph.name)
        program = compile_graph(
            graph,
            target=options.target,
            precision=options.precision,
            block_size=options.block_size,
            symmetric=not options.zero_points,
            keep=options.keep,
            batch_size=options.batch_size,
            prefill_seq_len=options.prefill_seq_len,
            ctx_len=options.ctx_len,
            out=options.output,
        )
    print(f"program:  {program}")
    for line in _errors(Manifest.read(program).options.get("quantized", {})):
        print(f"weights:  {line}")
    return 0


def _errors(quantized: dict[str, dict[str, float]]) -> list[str]:
    """Return a line for each number of bits: how many weights, and how far they are from what they were."""
    lines = []
    for bits in sorted({w["bits"] for w in quantized.values()}):
        errors = {name: w["error"] for name, w in quantized.items() if w["bits"] == bits}
        worst = max(errors, key=errors.__getitem__)
        mean = sum(errors.values()) / len(errors)
        lines.append(
            f"{len(errors)} at {bits} bits, off by {mean:.1%} of their size, {errors[worst]:.1%} at most ({worst})"
        )
    return lines


if __name__ == "__main__":
    sys.exit(run("compile"))
