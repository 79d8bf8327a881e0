# SPDX-License-Identifier: BSD-3-Clause
from pathlib import Path

import numpy as np
import pytest
import torch

from QEfficient import testing
from QEfficient.peft.loading import load_base
from QEfficient.testing.checks_pytorch import CHECKS
from QEfficient.testing.reference import Reference
from QEfficient.testing.report import CheckResult, Outcome, Stage
from QEfficient.testing.workload import make_workload
from scripts.coverage.shrink import tiny_model
from tests.testing.conftest import Folders
from tests.testing.healthy import HEALTHY
from tests.testing.planted_pytorch import MODEL_FAULTS, ModelFault
from tests.tiny import VOCAB, lora, save_adapter, save_base


def loaded(base: Path, **adapters: Path) -> Reference:
    """Load a model that a test may damage."""
    made = Reference(load_base(base, attn_implementation="eager"), make_workload(VOCAB, 256, greedy_tokens=8))
    for name, path in adapters.items():
        made.attach(name, path)
    return made


def ask_all(reference: Reference, subject: str = "one") -> dict[str, CheckResult]:
    """Perform every check of the stage."""
    found = [c.perform(Stage.PYTORCH, reference, subject) for c in CHECKS if c.of_adapters]
    return {r.name: r for r in found}


@pytest.mark.parametrize("fault", MODEL_FAULTS, ids=lambda f: f.name)
def test_planted_fault_is_named(folders: Folders, fault: ModelFault):
    """Each fault of a loaded model is flagged by the check that is there for it."""
    reference = loaded(folders.base, one=folders.one, two=folders.two)
    fault.plant(reference)
    flagged = {n: r.message for n, r in ask_all(reference).items() if r.outcome in (Outcome.FAIL, Outcome.WARN)}
    assert set(fault.checks) & set(flagged), flagged


def test_checks_leave_the_model_as_it_was(folders: Folders):
    """After every check each weight has the bits it had, and no adapter more or less is attached."""
    reference = loaded(folders.base, one=folders.one, two=folders.two)
    before = {k: v.clone() for k, v in reference.model.state_dict().items()}
    ask_all(reference)
    after = reference.model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(v, after[k]) for k, v in before.items())


@pytest.mark.parametrize(
    ("style", "fields", "check", "says"),
    [
        ("qwen2", {"target_modules": ["q_proj", "embed_tokens"]}, "merge", "one tied weight to both"),
        ("llama", {"use_dora": True}, "mixed", "does not mix variants of LoRA"),
        ("llama", {"layer_replication": [(0, 2), (1, 2)]}, "delete", "replicates the layers again"),
    ],
)
def test_what_peft_does_is_explained(tmp_path: Path, style: str, fields: dict[str, object], check: str, says: str):
    """What PEFT itself does differently is named as that, and accuses nobody."""
    base = save_base(tmp_path / "base", style)
    reference = loaded(base, one=save_adapter(base, tmp_path / "one", config=lora(**fields)))
    found = ask_all(reference)
    assert [r.message for r in found.values() if r.outcome is Outcome.FAIL] == []
    assert says in found[f"pytorch.{check}"].message


def test_logits_of_many_adapters_are_not_kept(folders: Folders, monkeypatch: pytest.MonkeyPatch):
    """Beyond a size the least recently used logits are forgotten, and computed again when asked for."""
    reference = loaded(folders.base, one=folders.one, two=folders.two)
    size = sum(r.nbytes for r in reference.workload_logits("one"))
    monkeypatch.setattr("QEfficient.testing.reference._KEPT_BYTES", size)
    first = reference.workload_logits("one")
    reference.workload_logits("two")
    assert list(reference._kept) == ["two"]
    assert all(np.array_equal(a, b) for a, b in zip(first, reference.workload_logits("one"), strict=True))


@pytest.mark.parametrize(
    "name", ["trainable tokens alone", "lora on embeddings", "boft", "road", "prompt tuning", "loha"]
)
def test_sound_adapter_of_any_method_passes(tmp_path: Path, name: str):
    """No check of files or model accuses a sound adapter, whatever its method; the fault bench asks about all of them."""
    style, make = HEALTHY[name]
    base = save_base(tmp_path / "base", style)
    adapter = save_adapter(base, tmp_path / "one", config=make())
    found = testing.run(base, {"one": adapter}, only=["adapter.*", "pytorch.*"])
    assert [r.message for r in found.results if r.outcome in (Outcome.FAIL, Outcome.WARN)] == []


def test_tensors_that_peft_does_not_load(tmp_path: Path):
    """Transformers renames Laguna's modules once too often when PEFT loads an adapter: that is said to be PEFT's fault."""
    tiny_model("laguna").save_pretrained(tmp_path / "base")
    adapter = save_adapter(tmp_path / "base", tmp_path / "one", config=lora(target_modules=["q_proj", "down_proj"]))
    found = ask_all(loaded(tmp_path / "base", one=adapter))["pytorch.reload"]
    assert found.outcome is Outcome.WARN
    assert "PEFT's own fault: it does not load 2 tensors" in found.message
    assert "shared_experts.down_proj.lora_A.weight" in found.message


@pytest.mark.parametrize(
    ("style", "target", "check", "says"),
    [
        ("mpt", "Wqkv", "pytorch.mixed", "it ignores adapter_names with this base, every row of a batch gets 'one'"),
        ("moshi", "linear", "pytorch.generate", "with its cache than without one, which is no fault of an adapter"),
    ],
)
def test_what_a_base_cannot_is_not_held_against_an_adapter(
    tmp_path: Path, style: str, target: str, check: str, says: str
):
    """PEFT passes no adapter_names on for MPT, and Moshi's cache changes what transformers generates."""
    tiny_model(style).save_pretrained(tmp_path / "base")
    adapter = save_adapter(tmp_path / "base", tmp_path / "one", config=lora(target_modules=[target]))
    found = ask_all(loaded(tmp_path / "base", one=adapter))[check]
    assert found.outcome is Outcome.WARN
    assert says in found.message
