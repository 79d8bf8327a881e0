# SPDX-License-Identifier: BSD-3-Clause
"""Refusals name the reason and the line of the model's own code, and offer ``--merge`` only where it helps."""

from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model
from peft.tuners.lora import Linear
from torch import Tensor

from QEfficient.errors import UnsupportedError
from QEfficient.export.torch_to_onnx import export_graph
from scripts.coverage.shrink import tiny_model
from tests.tiny import lora, make_base

REASONS = {
    "xlstm": r"it keeps 'rnn_state' in its cache, beside keys, values and states of layers \(modeling_xlstm.py:\d+: ",
    "minimax": r"it takes no cache but one of its own class \(modeling_minimax.py:\d+: ",
    "xlm": r"the values of a tensor decide what it computes \(modeling_xlm.py:\d+: assert ",
    "git": r"it computes differently unless ctx_len >= 3$",
}


@pytest.mark.parametrize("model_type", REASONS)
def test_refusal_names_the_reason(model_type: str, tmp_path: Path) -> None:
    """What a model does that a graph cannot is said in words, at its line, and nothing is written."""
    with pytest.raises(UnsupportedError, match=REASONS[model_type]):
        export_graph(tiny_model(model_type), tmp_path / "graph")
    assert not list(tmp_path.iterdir())


def _branches_on_values(self: Linear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return self.base_layer(x) if x.sum().item() > 0 else 2 * self.base_layer(x)


@pytest.mark.parametrize("model_type", ["llama", "xlm"])
def test_merge_is_offered_where_the_base_can_be_exported(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that cannot be traced may be merged; of a base that cannot, merging makes nothing better."""
    base = make_base() if model_type == "llama" else tiny_model(model_type)
    model = get_peft_model(base, lora(target_modules="all-linear"))
    monkeypatch.setattr(Linear, "forward", _branches_on_values)
    with pytest.raises(UnsupportedError, match="the values of a tensor decide") as e:
        export_graph(model, tmp_path / "graph", adapter_name="default")
    assert ("--merge exports the merged model" in str(e.value)) == (model_type == "llama")
