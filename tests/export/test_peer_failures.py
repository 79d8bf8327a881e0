# SPDX-License-Identifier: BSD-3-Clause
"""What goes wrong in other exporters: each test is named after a failure that was seen there, and compares with PyTorch."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM

from QEfficient import QEffAutoPeftModelForCausalLM
from QEfficient.contract import Manifest
from QEfficient.export.torch_to_onnx import export_graph
from QEfficient.export.weights import Checkpoint
from QEfficient.peft.adapters import Adapter, fit
from tests.export.test_torch_to_onnx import TOLERANCE, worst
from tests.peft.test_methods import swap_on_one_program
from tests.tiny import lora, make_base, make_peft, perturb, save_base

TARGETS = ["q_proj", "v_proj", "down_proj"]
VARIANTS = {
    "dora": lora(target_modules=TARGETS, use_dora=True),
    "lora_bias": lora(target_modules=TARGETS, lora_bias=True),
    "embedding": lora(target_modules=["q_proj", "embed_tokens"]),
    "lm_head": lora(target_modules=["q_proj", "lm_head"]),
    "modules_to_save": lora(target_modules=TARGETS, modules_to_save=["lm_head"]),
    "rslora_and_patterns": lora(
        target_modules=TARGETS, use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}
    ),
}


def adapted(config: PeftConfig, seed: int = 1, base: str = "llama") -> PeftModel:
    """Return a tiny model with adapter ``a``, every tensor of it moved."""
    return make_peft(make_base(base), config=copy.deepcopy(config), name="a", seed=seed)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_of_a_variant_can_be_swapped(variant: str, tmp_path: Path) -> None:
    """Elsewhere the graph is invalid (DoRA), keeps some tensors baked in (biases, embeddings) or drops them without an error."""
    swap_on_one_program(VARIANTS[variant], tmp_path)


@pytest.mark.parametrize("case", ["B is zero", "all tensors equal"])
def test_tensors_with_one_value_stay_apart(case: str, tmp_path: Path) -> None:
    """Elsewhere the exporter merges tensors with equal values, and the graph is invalid: 6 of 8 inputs are left."""
    model = make_peft(make_base("llama"), scale=0.0, name="a")
    if case == "all tensors equal":
        for path, parameter in model.named_parameters():
            if "lora_" in path:
                parameter.data.fill_(0.05)
    folder = export_graph(model, tmp_path / "graph", adapter_name="a")
    assert worst(model, "a", folder) < TOLERANCE
    perturb(model, "a", seed=9)
    assert worst(model, "a", folder) < TOLERANCE


def test_two_bases_of_one_configuration(tmp_path: Path) -> None:
    """Elsewhere the second base is served the first one's graph from the cache."""
    models = [make_peft(make_base("llama", seed=seed), name="a") for seed in (0, 1)]
    folders = [export_graph(model, tmp_path / "graph", adapter_name="a") for model in models]
    assert folders[0] != folders[1]
    assert max(worst(model, "a", folder) for model, folder in zip(models, folders, strict=True)) < TOLERANCE
    assert worst(models[0], "a", folders[1]) > 100 * TOLERANCE


def test_checkpoint_overwritten_in_place(tmp_path: Path) -> None:
    """Elsewhere the stale graph is served. Here its linked weights are no longer what was exported, and it is made anew."""
    base = save_base(tmp_path / "base", seed=0)

    def export() -> Path:
        model = make_peft(AutoModelForCausalLM.from_pretrained(base), name="a")
        folder = export_graph(model, tmp_path / "graph", adapter_name="a", checkpoint=Checkpoint(base))
        assert worst(model, "a", folder) < TOLERANCE
        return folder

    first = export()
    content = make_base("llama", seed=1)
    content.save_pretrained(tmp_path / "new")
    (base / "model.safetensors").write_bytes((tmp_path / "new" / "model.safetensors").read_bytes())
    assert export() != first


def test_exported_again_after_another_adapter_was_added(tmp_path: Path) -> None:
    """Elsewhere the second export fails, or returns a stale file, or needs the model loaded anew."""
    made = QEffAutoPeftModelForCausalLM(adapted(lora()))
    first = made.export(tmp_path / "graph")
    made.model.add_adapter("more", lora(r=2, lora_alpha=32, target_modules=["q_proj"], lora_bias=True))
    perturb(made.model, "more", seed=3)
    assert made.export(tmp_path / "graph") == first
    assert worst(made.model, "a", first.parent) < TOLERANCE
    made.model.set_adapter("more")
    other = QEffAutoPeftModelForCausalLM(made.model).export(tmp_path / "graph")
    assert other != first
    assert worst(made.model, "more", other.parent) < TOLERANCE
    assert worst(made.model, "a", first.parent) < TOLERANCE


def test_bfloat16_base(tmp_path: Path) -> None:
    """Elsewhere a bfloat16 base fails; here it is exported with its own weights, and the graph computes on them in float32."""
    base = make_base("llama").to(torch.bfloat16)
    folder = export_graph(make_peft(base, name="a"), tmp_path / "graph", adapter_name="a")
    wide = make_base("llama").to(torch.bfloat16).float()
    assert worst(make_peft(wide, name="a"), "a", folder) < TOLERANCE


def test_identical_configuration_with_another_dropout(tmp_path: Path) -> None:
    """Elsewhere such an adapter is refused, and exported again; so is one of another rank, scaling, init or base path."""
    other = lora(r=16, lora_alpha=3, lora_dropout=0.5, use_rslora=True, init_lora_weights="gaussian")
    other.base_model_name_or_path = "elsewhere"
    made = QEffAutoPeftModelForCausalLM(adapted(lora()))
    path = made.export(tmp_path / "graph")
    made.model.add_adapter("b", copy.deepcopy(other))
    perturb(made.model, "b", seed=3)
    made.model.eval()  # PEFT's new dropout is in training
    made.set_adapter("b")
    assert worst(made.model, "b", path.parent) < TOLERANCE
    alone = make_peft(make_base("llama"), seed=9, config=copy.deepcopy(other), name="b")
    assert export_graph(alone, tmp_path / "graph", adapter_name="b") == path.parent
    assert fit(Adapter.from_model(alone, "b"), Manifest.read(path.parent)).keys() == {
        spec.name for spec in Manifest.read(path.parent).adapter
    }
