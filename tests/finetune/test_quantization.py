"""Bases in fewer bits: they are that small, the adapter learns on them, and a missing library is named."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig

from QEfficient.cloud.finetune import main
from QEfficient.errors import ConfigError
from QEfficient.finetune.config import TrainConfig, resolve
from QEfficient.finetune.model import apply_peft
from QEfficient.finetune.quantization import quantized
from tests.tiny import SHAPE, make_base, save_adapter, save_base

LIBRARIES = {"bnb-4bit": "bitsandbytes", "bnb-8bit": "bitsandbytes", "torchao-int8": "torchao"}


@pytest.mark.parametrize("kind", LIBRARIES)
def test_missing_library_is_named(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the base is loaded it is said what to install."""
    monkeypatch.setitem(sys.modules, LIBRARIES[kind], None)
    with pytest.raises(ConfigError, match=f"quantization '{kind}' needs {LIBRARIES[kind]}.*pip install"):
        quantized(kind, torch.float32)
    assert quantized("none", torch.float32) == {}


@pytest.mark.parametrize("options", [{"use_peft": False}, {"fsdp": True}])
def test_only_a_frozen_base(options: dict[str, Any], tmp_path: Path) -> None:
    """Weights of 4 bits cannot be trained, nor sharded here."""
    with pytest.raises(ConfigError, match="bnb-4bit is for a frozen base"):
        resolve("test", model_name="x", train_file=tmp_path, quantization="bnb-4bit", **options)


@pytest.mark.parametrize("continued", [False, True])
def test_weights_are_not_packed_for_inference(continued: bool, tmp_path: Path) -> None:
    """Neither under a new adapter nor under one that is trained on: packed weights have no gradient."""
    base, adapter = save_base(tmp_path / "base"), None
    if continued:
        adapter = save_adapter(base, tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(base)
    layer = model.model.layers[0].self_attn.q_proj
    layer.support_avx512bf16_for_cpu = True  # as bitsandbytes' layers say on CPUs that have it
    apply_peft(model, TrainConfig(quantization="bnb-4bit", from_peft_checkpoint=adapter))
    assert layer.support_avx512bf16_for_cpu is False


@pytest.mark.slow
@pytest.mark.parametrize("kind", LIBRARIES)
def test_adapter_learns_on_a_quantized_base(kind: str, tokenizer: Any, tmp_path: Path, write_rows: Any) -> None:
    """Also when the model was evaluated before, which packs bitsandbytes' weights; the adapter then works on the whole base."""
    pytest.importorskip(LIBRARIES[kind], reason="an optional library, in no environment of ours by default")
    shape = {**SHAPE, "vocab_size": len(tokenizer), "intermediate_size": 128}
    make_base(LlamaConfig(**shape)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    metrics = main(
        model_name=str(tmp_path / "base"),
        train_file=write_rows(*({"prompt": "ab" * n, "completion": "cd" * n} for n in range(1, 17))),
        output_dir=tmp_path / "out",
        quantization=kind,
        val_share=0.2,
        lr=1e-2,
        num_epochs=3,
        lora_r=4,
    )
    assert metrics["perplexity"] < metrics["perplexity_before"] / 10
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "out"))
    ids = torch.tensor([tokenizer("<s>ababab").input_ids])
    with torch.no_grad():
        logits, plain = model(ids).logits, model.base_model.disable_adapter_layers() or model(ids).logits
    assert logits.isfinite().all()
    assert (logits - plain).abs().max() > 0.1
