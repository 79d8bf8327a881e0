# SPDX-License-Identifier: BSD-3-Clause
"""Configurations of sound adapters, over PEFT's methods: no check may accuse one of them. Used by tests and the fault bench."""

from collections.abc import Callable
from typing import Any

import peft

from tests.tiny import lora

_CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}
_LINEAR: dict[str, Any] = {**_CAUSAL, "target_modules": ["q_proj", "v_proj", "down_proj"]}
_QV: dict[str, Any] = {**_CAUSAL, "target_modules": ["q_proj", "v_proj"]}

HEALTHY: dict[str, tuple[str, Callable[[], Any]]] = {
    "lora": ("llama", lora),
    "lora on gpt2": ("gpt2", lambda: lora(target_modules=["c_attn", "c_proj", "c_fc"])),
    "lora on mistral": ("mistral", lora),
    "lora on qwen2, tied": ("qwen2", lora),
    "lora on qwen3": ("qwen3", lora),
    "lora on gemma2": ("gemma2", lora),
    "lora on phi3": ("phi3", lambda: lora(target_modules=["qkv_proj", "o_proj", "down_proj"])),
    "rslora": ("llama", lambda: lora(use_rslora=True)),
    "dora": ("llama", lambda: lora(use_dora=True)),
    "lora_bias": ("llama", lambda: lora(lora_bias=True)),
    "rank and alpha patterns": ("llama", lambda: lora(rank_pattern={"q_proj": 8}, alpha_pattern={"v_proj": 32})),
    "pissa": ("llama", lambda: lora(init_lora_weights="pissa")),
    "olora": ("llama", lambda: lora(init_lora_weights="olora")),
    "two layers of one": ("llama", lambda: lora(target_modules=["q_proj"], layers_to_transform=[1])),
    "modules_to_save": ("llama", lambda: lora(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "trainable tokens": ("llama", lambda: lora(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 5]})),
    "lora on embeddings": ("llama", lambda: lora(target_modules=["q_proj", "embed_tokens", "lm_head"])),
    "lora on tied embeddings": ("qwen2", lambda: lora(target_modules=["q_proj", "embed_tokens"])),
    "layer replication": ("llama", lambda: lora(target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)])),
    "regular expression": ("llama", lambda: lora(target_modules=r".*layers\.1\..*(q|v)_proj")),
    "adalora": ("llama", lambda: peft.AdaLoraConfig(**_LINEAR, init_r=4, target_r=2, total_step=10)),
    "ia3": ("llama", lambda: peft.IA3Config(**_CAUSAL, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "loha": ("llama", lambda: peft.LoHaConfig(**_LINEAR, r=4, alpha=4, init_weights=False)),
    "lokr": ("llama", lambda: peft.LoKrConfig(**_LINEAR, r=4, alpha=4, init_weights=False)),
    "oft": ("llama", lambda: peft.OFTConfig(**_LINEAR, oft_block_size=16, use_cayley_neumann=False)),
    "boft": ("llama", lambda: peft.BOFTConfig(**_QV, boft_block_size=4)),
    "hra": ("llama", lambda: peft.HRAConfig(**_LINEAR, r=4)),
    "vera": ("llama", lambda: peft.VeraConfig(**_QV, r=8)),
    "vblora": ("llama", lambda: peft.VBLoRAConfig(**_LINEAR, r=4, num_vectors=8, vector_length=8, topk=2)),
    "fourierft": ("llama", lambda: peft.FourierFTConfig(**_LINEAR, n_frequency=32)),
    "waveft": ("llama", lambda: peft.WaveFTConfig(**_LINEAR, n_frequency=32)),
    "c3a": ("llama", lambda: peft.C3AConfig(**_LINEAR, block_size=16)),
    "miss": ("llama", lambda: peft.MissConfig(**_LINEAR, r=4)),
    "randlora": ("llama", lambda: peft.RandLoraConfig(**_LINEAR, r=4)),
    "road": ("llama", lambda: peft.RoadConfig(**_LINEAR, group_size=16)),
    "shira": ("llama", lambda: peft.ShiraConfig(**_LINEAR, r=2)),
    "ln tuning": ("llama", lambda: peft.LNTuningConfig(**_CAUSAL, target_modules=["input_layernorm", "norm"])),
    "trainable tokens alone": ("llama", lambda: peft.TrainableTokensConfig(**_CAUSAL, token_indices=[3, 5], target_modules=["embed_tokens"])),
    "prompt tuning": ("llama", lambda: peft.PromptTuningConfig(**_CAUSAL, num_virtual_tokens=4)),
    "p-tuning": ("llama", lambda: peft.PromptEncoderConfig(**_CAUSAL, num_virtual_tokens=4, encoder_hidden_size=16)),
    "prefix tuning": ("llama", lambda: peft.PrefixTuningConfig(**_CAUSAL, num_virtual_tokens=4)),
}  # fmt: skip
"""Style of base and configuration, by name."""
