# SPDX-License-Identifier: BSD-3-Clause
"""Bases and adapters as they are found on disk: halves, shards, tied and resized embeddings, adapters of old PEFT versions."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from QEfficient.contract import Manifest
from QEfficient.errors import ArtifactError
from QEfficient.peft.unloaded import export_adapters
from tests.export.test_torch_to_onnx import TOLERANCE, worst
from tests.tiny import lora, make_base, save_adapter, save_base

# What LoraConfig of PEFT 0.10.0 wrote into adapter_config.json.
FIELDS_0_10 = (
    "alpha_pattern auto_mapping base_model_name_or_path bias fan_in_fan_out inference_mode init_lora_weights layer_replication "
    "layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout megatron_config megatron_core modules_to_save "
    "peft_type r rank_pattern revision target_modules task_type use_dora use_rslora"
).split()

BASES = {
    "bfloat16 in shards": ("llama", torch.bfloat16, None, "60KB"),
    "float16, tied": ("qwen2", torch.float16, None, "5GB"),
    "resized": ("llama", torch.float32, 133, "5GB"),
    "bfloat16, tied, resized, in shards": ("qwen2", torch.bfloat16, 133, "60KB"),
}


def in_pytorch(base: Path, adapter: Path) -> PeftModel:
    """Load both in float32, as they are run."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter), adapter_name="x").eval()


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] if c == "resized" else []) for c in BASES])
def test_bases(case: str, tmp_path: Path) -> None:
    """The graph refers to the files as they are, and computes PyTorch's float32 logits on their values."""
    style, dtype, vocabulary, shard = BASES[case]
    model = make_base(style).to(dtype)
    if vocabulary is not None:
        model.resize_token_embeddings(vocabulary)
    base = tmp_path / "base"
    model.save_pretrained(base, max_shard_size=shard)
    adapter = save_adapter(base, tmp_path / "x")
    folder = export_adapters(base, {"x": adapter}, tmp_path / "graph")
    linked = [p for p in folder.glob("weights*") if p.stat().st_nlink > 1]
    assert len(linked) == len(list(base.glob("*.safetensors"))) > (1 if "shards" in case else 0)
    assert not (folder / "weights.safetensors").exists()
    assert Manifest.read(folder).vocab_size == (vocabulary or 128)
    assert worst(in_pytorch(base, adapter), "x", folder) < TOLERANCE


@pytest.mark.parametrize("method", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_adapters_of_peft_0_10(method: str, tmp_path: Path) -> None:
    """A configuration with the fields of PEFT 0.10 only, and its names of tensors, give the same graph and values."""
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "x", config=lora(target_modules=["q_proj"], use_dora=method == "dora"))
    today = export_adapters(base, {"x": adapter}, tmp_path / "graph")
    want = in_pytorch(base, adapter)
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: config.get(key) for key in FIELDS_0_10}))
    file = adapter / "adapter_model.safetensors"
    tensors = {
        n.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): t for n, t in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    folder = export_adapters(base, {"x": adapter}, tmp_path / "graph")
    assert folder == today
    assert worst(want, "x", folder) < TOLERANCE
    assert worst(in_pytorch(base, adapter), "x", folder) < TOLERANCE


def test_pickled_adapters_are_named(tmp_path: Path) -> None:
    """``adapter_model.bin`` is a pickle, which can run code when it is loaded: the error says what to do."""
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "x")
    file = adapter / "adapter_model.safetensors"
    torch.save(load_file(file), adapter / "adapter_model.bin")
    file.unlink()
    with pytest.raises(ArtifactError, match=r"adapter_model\.bin is a pickle, which is not loaded: convert it"):
        export_adapters(base, {"x": adapter}, tmp_path / "graph")
