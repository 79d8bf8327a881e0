# SPDX-License-Identifier: BSD-3-Clause
"""What blocks cost a base that was trained: its perplexity at float32, and the change at each precision.

Takes the base of the demo (``scripts/demo`` makes it) and documents of the demo's corpus that it was not trained on. Rows are
programs, as ``decode.py`` names them: a precision, perhaps with its block size, perhaps with zero points (``int4-128-zero``). The last
line is JSON.

    python benchmarks/perplexity.py --demo demo --work DIR
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from machine import machine
from transformers import AutoModelForCausalLM, AutoTokenizer

from QEfficient.compile.program import compile_graph
from QEfficient.export.torch_to_onnx import export_graph
from QEfficient.export.weights import Checkpoint
from QEfficient.options import option, parse
from QEfficient.runtime.session import OrtSession

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "demo"))
from corpus import documents

HELD_OUT_SEED = 1
"""The demo trains on the documents of seed 0."""


@dataclass(slots=True, kw_only=True)
class Options:
    """Measure a trained base's perplexity at several precisions."""

    demo: Path = option(help="Folder that scripts/demo has written.")
    work: Path = option(help="Folder for the graph and the programs.")
    documents: int = option(300, "Documents.")
    tokens: int = option(160, "Most tokens of each.")
    programs: list[str] = option(["int8", "int4", "int4-zero", "int4-128"], "Programs. Repeatable.")


def perplexity(program: Path, rows: Sequence[np.ndarray]) -> float:
    """Return the perplexity of a program with all logits over rows of tokens."""
    session = OrtSession(program, threads=1)
    session.allocate(1, max(map(len, rows)))
    total, count = 0.0, 0
    for row in rows:
        session.reset()
        logits = session.run(row[None, :-1], np.arange(len(row) - 1)[None])[0].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        likely = logits[np.arange(len(row) - 1), row[1:]] - np.log(np.exp(logits).sum(-1))
        total, count = total - float(likely.sum()), count + len(likely)
    return float(np.exp(total / count))


def main() -> None:
    """Run the benchmark."""
    options = parse(Options, sys.argv[1:], prog="benchmarks/perplexity.py")
    base = options.demo / "base"
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = documents(options.documents, seed=HELD_OUT_SEED)
    rows = [np.array(tokenizer(text)["input_ids"][: options.tokens]) for text in texts]
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    graph = export_graph(model, options.work / "perplexity", checkpoint=Checkpoint(base), logits="all")
    reference = perplexity(compile_graph(graph), rows)
    found = {"fp32": reference}
    print(f"fp32: {reference:.4f}, {sum(map(len, rows))} tokens")
    for name in options.programs:
        precision, *how = name.split("-")
        blocks = next((int(h) for h in how if h.isdigit()), None)
        program = compile_graph(graph, precision=precision, block_size=blocks, symmetric="zero" not in how)
        found[name] = perplexity(program, rows)
        print(f"{name}: {found[name]:.4f}, {found[name] / reference - 1:+.2%}")
    print(json.dumps({"perplexity": found, **machine(options)}))


if __name__ == "__main__":
    main()
