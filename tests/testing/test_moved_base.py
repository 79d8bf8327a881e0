# SPDX-License-Identifier: BSD-3-Clause
"""Adapters without which PEFT's model is not the base again, and adapters that take places of the cache."""

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest

from QEfficient import testing
from QEfficient.peft.loading import load_base
from QEfficient.testing.reference import Reference
from QEfficient.testing.report import Outcome, Stage
from QEfficient.testing.workload import make_workload
from tests.tiny import VOCAB, lora, save_adapter, save_base


def test_base_of_a_graph_with_replicated_layers(tmp_path: Path) -> None:
    """It is held against PEFT with the adapter disabled, which keeps the layers, and that is said."""
    base = save_base(tmp_path / "base")
    replicated = lora(target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)])
    adapter = save_adapter(base, tmp_path / "one", config=replicated)
    report = testing.run(base, {"one": adapter}, only=["pytorch.disabled", "graph.prefill"])
    assert [r.message for r in report.with_outcome(Outcome.FAIL)] == []
    (warned,) = report.with_outcome(Outcome.WARN)
    assert warned.name == "pytorch.disabled"
    prefill = next(r for r in report.results if r.stage is Stage.GRAPH and r.subject == "base")
    assert "is not the bare base, PEFT's own limit: replicated layers stay" in prefill.message


def test_base_is_the_untouched_one_unless_peft_cannot(tmp_path: Path) -> None:
    """Only a known limit of PEFT replaces the base: with plain LoRA a wrapper that changes it is still found."""
    base = save_base(tmp_path / "base")
    reference = Reference(load_base(base, attn_implementation="eager"), make_workload(VOCAB, 256))
    reference.attach("one", save_adapter(base, tmp_path / "one"))
    reference.model.base_model.model.lm_head.weight.data *= 2
    assert reference.base_moved is None
    assert reference.disabled_logits() is reference.untouched
    assert not np.allclose(reference.logits("base", reference.short), reference.untouched[1])


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        pytest.param(
            peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), marks=pytest.mark.slow
        ),  # the same mechanism
    ],
    ids=["prompt tuning", "prefix tuning"],
)
def test_virtual_tokens_stand_in_front(tmp_path: Path, config: Any) -> None:
    """The cache is compared behind them, and the longest row leaves them room."""
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "one", config=config)
    report = testing.run(base, {"one": adapter}, only=["graph.layers", "graph.long"])
    found = {r.name: r for r in report.results if r.subject == "one"}
    assert [r.outcome for r in found.values()] == [Outcome.PASS, Outcome.PASS]
    assert "all 2 layers" in found["graph.layers"].message
    assert "of 252 that fill the cache" in found["graph.long"].message
