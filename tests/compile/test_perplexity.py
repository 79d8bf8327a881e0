# SPDX-License-Identifier: BSD-3-Clause
"""What rounded weights cost in perplexity, on a model that has learned something: random weights say little about that."""

from pathlib import Path

import numpy as np
import pytest
import torch

from QEfficient.compile.program import compile_graph
from QEfficient.export.torch_to_onnx import export_graph
from QEfficient.runtime.session import OrtSession
from tests.tiny import VOCAB, make_base

LENGTH = 48
# Seen 0.003 %, 0.03 to 0.06 % and 3.0 to 3.3 %. Sums over 64 weights average little of the rounding away; wider models lose less.
ALLOWED = {"bf16": 0.001, "int8": 0.005, "int4": 0.05}


def _text(rows: int, seed: int) -> torch.Tensor:
    """Tokens in which two tokens back decide between four that may follow, with unequal chances."""
    rng = np.random.default_rng(seed)
    follow = np.random.default_rng(0).integers(3, VOCAB, (VOCAB, 4))
    ids = rng.integers(3, VOCAB, (rows, LENGTH + 1))
    for at in range(2, LENGTH + 1):
        ids[:, at] = follow[ids[:, at - 2], rng.choice(4, rows, p=[0.6, 0.2, 0.15, 0.05])]
    return torch.from_numpy(ids)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a tiny Llama for some seconds, and export it."""
    model = make_base("llama").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(250):
        ids = _text(32, step + 1)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return export_graph(model.eval(), tmp_path_factory.mktemp("trained") / "graph", logits="all")


def _perplexity(folder: Path) -> float:
    ids = _text(32, 10**6).numpy()
    session = OrtSession(folder, threads=1)
    session.allocate(len(ids), LENGTH)
    logits = session.run(ids[:, :-1], np.tile(np.arange(LENGTH), (len(ids), 1))).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    likely = np.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0] - np.log(np.exp(logits).sum(-1))
    return float(np.exp(-likely[:, 4:].mean()))


@pytest.mark.parametrize("precision", ALLOWED)
def test_perplexity(trained, tmp_path, precision):
    """A trained model's perplexity changes by no more than what is allowed."""
    before = _perplexity(trained)
    assert before < 20  # it has learned: it started near 128
    after = _perplexity(compile_graph(trained, precision=precision, out=tmp_path))
    assert abs(after / before - 1) < ALLOWED[precision]
