# SPDX-License-Identifier: BSD-3-Clause
"""Tiny seeded models and adapters, made from configurations."""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 128
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,  # with the usual 0.02, logits of a random model are too alike to compare
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

STYLES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=5),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32),
    "gemma2": Gemma2Config(**SHAPE, head_dim=16, sliding_window=5),
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=256,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "phi3": Phi3Config(**SHAPE),
}


def make_base(config: PreTrainedConfig | str = "llama", *, seed: int = 0) -> PreTrainedModel:
    """Return a random float32 model, the same for the same seed."""
    torch.manual_seed(seed)
    made = copy.deepcopy(STYLES[config] if isinstance(config, str) else config)  # a model notes its own dtype there
    model: PreTrainedModel = AutoModelForCausalLM.from_config(made)
    return model.eval()


def lora(**fields: Any) -> LoraConfig:
    """Return a LoRA configuration of rank 4 on all linear layers, with fields replaced."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields})


def make_peft(
    base: PreTrainedModel, *, seed: int = 1, scale: float = 0.1, config: PeftConfig | None = None, name: str = "default"
) -> PeftModel:
    """Put an adapter with random tensors (all of them: B too) on ``base``."""
    model = get_peft_model(base, config or lora(), adapter_name=name)
    perturb(model, name, seed=seed, scale=scale)
    return model.eval()


def perturb(model: PeftModel, name: str, *, seed: int, scale: float = 0.1) -> None:
    """Add noise to every tensor of adapter ``name``."""
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        if name in path.split("."):
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)


def save_base(folder: Path, config: PreTrainedConfig | str = "llama", *, seed: int = 0) -> Path:
    """Write a base folder and return it."""
    make_base(config, seed=seed).save_pretrained(folder)
    return folder


def save_adapter(
    base: Path, folder: Path, *, seed: int = 1, scale: float = 0.1, config: PeftConfig | None = None
) -> Path:
    """Write an adapter folder for the base in folder ``base`` and return it."""
    model = AutoModelForCausalLM.from_pretrained(base)
    make_peft(model, seed=seed, scale=scale, config=config).save_pretrained(str(folder))
    return folder
