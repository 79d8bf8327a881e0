# SPDX-License-Identifier: BSD-3-Clause
"""A sample of the coverage table: architectures that differ in what they keep, and in how they count positions."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from QEfficient.errors import ConfigError, UnsupportedError
from QEfficient.export.positions import PastLength, RowPositions
from QEfficient.export.torch_to_onnx import export_graph
from QEfficient.runtime.session import OrtSession
from scripts.coverage.case import run_architecture
from scripts.coverage.shrink import tiny_model

SAMPLE = {
    "bart": "learned positions, counted from the cache's length",
    "roberta": "positions counted from the tokens themselves",
    "xglm": "positions end at a table's length",
    "mpt": "ALiBi, from a table that ends",
    "gpt_neo": "windows cut from a table, as if a call's tokens were the last of the keys",
    "gpt_oss": "attention sinks, sliding windows, experts",
    "mixtral": "experts with LoRA on their stacked weights",
    "qwen3_next": "recurrent state beside keys and values",
    "jamba": "state space layers",
    "jetmoe": "sizes that depend on data, in a layer that is stamped",
}


@pytest.mark.parametrize("model_type", SAMPLE)
def test_architecture_equals_pytorch(model_type: str) -> None:
    """Prefill, chunks, decode and ragged rows, two adapters and the base give PyTorch's logits."""
    found = run_architecture(model_type)
    assert found["outcome"] == "pass", found
    assert found["effect"] > 0.1


def test_recurrent_session(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """A recurrent state goes on, begins anew at position 0 and cannot go back; a repeated token changes nothing."""
    session = OrtSession(export_graph(tiny_model("mamba"), tmp_path / "graph"), threads=1)
    session.allocate(1, 16)
    ids = np.array([[5, 6, 7]])
    first = session.run(ids, np.array([[0, 1, 2]]))
    assert np.array_equal(session.run(ids[:, 2:], np.array([[2]])), first)
    with pytest.raises(ConfigError, match="row 0 is at position 2 and cannot go to 1"):
        session.run(ids[:, :1], np.array([[1]]))
    assert np.array_equal(session.run(ids, np.array([[0, 1, 2]])), first)


def test_time_steps_are_limited(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """One token at a time, time steps are kept within the limit that transformers keeps where it takes many at once."""
    config = tiny_model("mamba2").config
    config.time_step_limit = (0.02, 0.05)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        whole = model(ids).logits[0, -1].numpy()
        kept = model(ids[:, :-1], use_cache=True).cache_params
        stepped = model(ids[:, -1:], cache_params=kept, use_cache=True).logits[0, -1].numpy()
    session = OrtSession(export_graph(model, tmp_path / "graph"), threads=1)
    session.allocate(1, 16)
    got = session.run(ids.numpy(), np.arange(12)[None])[0, -1]
    assert np.abs(got - whole).max() < 1e-5 * np.ptp(whole)
    assert np.abs(stepped - whole).max() > 1e-3 * np.ptp(whole)  # transformers with its cache: why this is a repair


@pytest.mark.parametrize("way", ["range", "sum", "table"])
def test_positions_are_each_row_own(way: str) -> None:
    """Whatever a model computes from the cache's length counts from each row's own start."""
    past, table = PastLength(0), torch.arange(10, 30)[None]
    with RowPositions(torch.tensor([[4, 5, 6], [0, 1, 2]])):
        if way == "range":
            seen = torch.arange(past, past + 3).expand(2, -1) + 2
        elif way == "sum":
            seen = (torch.arange(3) + past).unsqueeze(0) + 2
        else:
            seen = table[:, past : past + 3] - 8
    assert seen.tolist() == [[6, 7, 8], [2, 3, 4]]


def test_unknown_use_of_positions_is_refused() -> None:
    """A computation of positions that is not understood is refused, not guessed."""
    positions = torch.tensor([[4, 5, 6], [0, 1, 2]])
    with RowPositions(positions), pytest.raises(UnsupportedError, match="computes its positions with"):
        torch.cumsum(torch.arange(3) + PastLength(0), 0)
