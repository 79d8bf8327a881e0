# SPDX-License-Identifier: BSD-3-Clause
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from QEfficient.peft.loading import load_base
from QEfficient.testing.checks_pytorch import CHECKS
from QEfficient.testing.reference import Reference
from QEfficient.testing.report import CheckResult, Outcome, Stage
from QEfficient.testing.workload import make_workload
from tests.testing.conftest import Folders
from tests.tiny import VOCAB, lora, save_adapter

ADAPTER = [c.name for c in CHECKS if c.of_adapters]


@pytest.fixture
def own(folders: Folders) -> Reference:
    """Load a model that a test may damage."""
    made = Reference(load_base(folders.base, attn_implementation="eager"), make_workload(VOCAB, 256, greedy_tokens=8))
    made.attach("one", folders.one)
    return made


def ask(name: str, reference: Reference, subject: str = "one") -> CheckResult:
    """Perform one check."""
    return next(c for c in CHECKS if c.name == name).perform(Stage.PYTORCH, reference, subject)


@pytest.mark.parametrize("name", ADAPTER)
def test_healthy_adapter_passes(reference: Reference, name: str):
    """No check accuses a trained adapter."""
    found = ask(name, reference)
    assert found.outcome is Outcome.PASS, found.message


def test_effect_is_what_the_adapter_changes(reference: Reference):
    """The measured effect is the largest change of the logits, relative to their range."""
    with torch.no_grad():
        largest = 0.0
        for row, base in zip(reference.workload.rows, reference.untouched, strict=True):
            change = abs(reference.logits("one", row) - base)
            largest = max(largest, float((change.max(1) / (base.max(1) - base.min(1))).max()))
    assert ask("effect", reference).measured == pytest.approx(largest, rel=1e-5)


def test_untrained_adapter_fails(folders: Folders, tmp_path: Path):
    """An adapter whose output equals the base's fails."""
    made = Reference(load_base(folders.base, attn_implementation="eager"), make_workload(VOCAB, 256))
    made.attach("one", save_adapter(folders.base, tmp_path / "untrained", scale=0.0))
    found = ask("effect", made)
    assert (found.outcome, found.measured) == (Outcome.FAIL, 0.0)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_no_check_changes_the_base(kind: str, folders: Folders, tmp_path: Path):
    """PEFT takes factors of these off the base whenever it makes another adapter of their kind; no check does."""
    made = Reference(load_base(folders.base, attn_implementation="eager"), make_workload(VOCAB, 256, greedy_tokens=8))
    made.attach("one", save_adapter(folders.base, tmp_path / "one", config=lora(init_lora_weights=kind)))
    before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    found = {check.name: check.perform(Stage.PYTORCH, made, "one").outcome for check in CHECKS if check.of_adapters}
    assert found["weighted"] is Outcome.SKIP
    assert Outcome.FAIL not in found.values(), found
    assert all(torch.equal(p, before[n]) for n, p in made.model.named_parameters())


def change_base(model: torch.nn.Module) -> None:
    """Change a base weight by 5 %, as a wrapper that merges without undoing it would."""
    model.get_parameter("base_model.model.model.layers.1.mlp.up_proj.base_layer.weight").data *= 1.05


def break_base(model: torch.nn.Module) -> None:
    """Put a NaN into a base weight."""
    model.get_parameter("base_model.model.model.layers.1.mlp.up_proj.base_layer.weight").data[3, 3] = float("nan")


@pytest.mark.parametrize(
    ("check", "fault"), [("disabled", change_base), ("finite", break_base), ("effect", break_base)]
)
def test_fault_is_found(own: Reference, check: str, fault: Callable[[torch.nn.Module], None]):
    """A base that does not come back, and logits that are not finite, fail."""
    fault(own.model)
    assert ask(check, own).outcome is Outcome.FAIL
