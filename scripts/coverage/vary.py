# SPDX-License-Identifier: BSD-3-Clause
"""Held-out configurations: other numbers for what a tiny configuration fixes, drawn by a seed.

No model is named: a field is changed where a configuration has it, and left alone where others depend on it.
"""

import random
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from scripts.coverage.shrink import SPECIAL

_ODD_VOCAB = 131
_SCALED: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 64},
}
_LATENT = ("kv_lora_rank", "qk_rope_head_dim")


def variation(model_type: str, seed: int) -> dict[str, Any]:
    """Return fields of a tiny configuration to set otherwise; the same for the same seed."""
    draw = random.Random(f"{model_type} {seed}")
    config = CONFIG_MAPPING[model_type]()
    text = config.get_text_config(decoder=True)
    has = {name for name in vars(text) if not name.startswith("_")}
    latent = any(name in has for name in _LATENT)
    fields: dict[str, Any] = {"vocab_size": _ODD_VOCAB, "tie_word_embeddings": draw.random() < 0.5}
    heads, kv_heads, head_dim = draw.choice([(8, 2, 8), (4, 1, 16), (4, 4, 16), (2, 2, 32), (8, 4, 16), (4, 2, 24)])
    if {"num_attention_heads", "num_key_value_heads", "head_dim"} <= has and not latent and model_type not in SPECIAL:
        fields |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    else:
        head_dim = 16
    rope = getattr(text, "rope_parameters", None)
    if isinstance(rope, dict) and "rope_type" in rope and not latent:
        kind = draw.choice(list(_SCALED))
        scaled = {k: v for k, v in rope.items() if k in ("rope_theta", "partial_rotary_factor")}
        scaled |= {"rope_type": kind, **_SCALED[kind]}
        if kind == "longrope":
            pairs = int(head_dim * float(rope.get("partial_rotary_factor") or 1)) // 2
            scaled |= {"short_factor": [1.1] * pairs, "long_factor": [2.0] * pairs}
        fields["rope_parameters"] = scaled
    if isinstance(getattr(text, "sliding_window", None), int):
        fields["sliding_window"] = draw.choice([3, 4, 7])
    return {k: v for k, v in fields.items() if k in has or k == "tie_word_embeddings"}
