# SPDX-License-Identifier: BSD-3-Clause
"""What held-out faults taught, and faults of training and combining; adapters of virtual tokens through every stage."""

import shutil
from pathlib import Path

import peft
import pytest
from transformers import AutoConfig

from QEfficient import testing
from QEfficient.peft.loading import load_base
from QEfficient.testing.adapter_stage import examine
from QEfficient.testing.checks_pytorch import CHECKS
from QEfficient.testing.reference import Reference
from QEfficient.testing.report import Outcome, Stage
from QEfficient.testing.selection import Selection
from QEfficient.testing.workload import make_workload
from tests.testing.conftest import Folders
from tests.testing.planted_adapters import Fault
from tests.testing.planted_held_out import HELD_OUT_ADAPTER_FAULTS
from tests.testing.planted_pytorch import MODEL_FAULTS, ModelFault
from tests.tiny import VOCAB, save_adapter, save_base

FLAGGED = (Outcome.FAIL, Outcome.WARN)
USES = ("pytorch.weighted", "pytorch.gradients", "pytorch.generate")


@pytest.mark.parametrize("fault", [f for f in HELD_OUT_ADAPTER_FAULTS if f.checks], ids=lambda f: f.name)
def test_fault_of_a_folder_is_named(folders: Folders, tmp_path: Path, fault: Fault):
    """Each is flagged by a check that is meant for it."""
    folder = Path(shutil.copytree(folders.one, tmp_path / "one"))
    base = Path(shutil.copytree(folders.base, tmp_path / "base"))
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace(str(folders.base), str(base)))
    fault.plant(folder)
    found = examine("one", folder, str(base), AutoConfig.from_pretrained(base), Selection())
    assert {r.name for r in found.results if r.outcome in FLAGGED} & set(fault.checks)


@pytest.mark.parametrize("fault", [f for f in MODEL_FAULTS if f.checks[0] in USES], ids=lambda f: f.name)
def test_fault_of_use_is_named(folders: Folders, fault: ModelFault):
    """Faults of generating, training on and combining are flagged by their checks."""
    made = Reference(load_base(folders.base, attn_implementation="eager"), make_workload(VOCAB, 256, greedy_tokens=8))
    made.attach("one", folders.one)
    made.attach("two", folders.two)
    fault.plant(made)
    check = next(c for c in CHECKS if f"pytorch.{c.name}" == fault.checks[0])
    assert check.perform(Stage.PYTORCH, made, "one").outcome in FLAGGED


VIRTUAL = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "tasks": lambda: peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_tasks=2),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "encoder": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
}
SLOW = [pytest.param(name, style, marks=pytest.mark.slow) for name in VIRTUAL for style in ("gpt2", "llama")]


@pytest.mark.parametrize(("name", "style"), [("prompt", "qwen3"), *SLOW])
def test_virtual_tokens_pass_every_stage(tmp_path: Path, name: str, style: str):
    """Two adapters of virtual tokens run through every stage; the layers that are compared hold their entries, too."""
    base = save_base(tmp_path / "base", style)
    adapters = {f"{name}{i}": save_adapter(base, tmp_path / f"{i}", seed=i, config=VIRTUAL[name]()) for i in (1, 2)}
    only = ["adapter.*", "pytorch.*", "graph.*"] if style == "qwen3" else []
    found = testing.run(base, adapters, only=only, greedy_tokens=8)
    assert found.verdict is Outcome.PASS, [f"{r.name}: {r.message}" for r in found.with_outcome(Outcome.FAIL)]
    layers = [r for r in found.results if r.name == "graph.layers" and r.subject in adapters]
    assert [len(r.series[0].y) for r in layers] == [4, 4]
