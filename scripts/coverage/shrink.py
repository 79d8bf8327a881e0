# SPDX-License-Identifier: BSD-3-Clause
"""Tiny configurations of any model type: whatever field of a configuration is a size gets a small one.

No model is named here. Sizes are set by the names that configurations give them; lists with one entry for each layer
are cut to the first layer of each kind.
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 128
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, EXPERTS = 64, 4, 2, 16, 96, 4

_NAMES: tuple[tuple[int | float | bool, str], ...] = (
    (VOCAB, "vocab_size vocab_size_per_layer_input padded_vocab_size n_vocab"),
    (
        HIDDEN,
        "hidden_size n_embd d_model embed_dim embedding_size word_embed_proj_dim embedding_dim model_dim lru_width "
        "cross_hidden_size projection_dim mm_embed_dim output_hidden_size out_hidden_size attention_hidden_size emb_dim "
        "vision_output_dim output_proj_dims dim_model",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
        "swa_num_attention_heads num_attention_heads_swa num_encoder_attention_heads num_decoder_attention_heads",
    ),
    (
        KV_HEADS,
        "num_key_value_heads num_kv_heads n_head_kv kv_n_heads attn_kv_heads num_global_key_value_heads "
        "swa_num_key_value_heads num_query_groups encoder_num_key_value_heads decoder_num_key_value_heads",
    ),
    (
        HEAD_DIM,
        "head_dim d_head d_kv v_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim kv_lora_rank "
        "attention_head_dim global_head_dim hidden_size_per_layer_input swa_head_dim swa_v_head_dim kv_channels dim_head "
        "index_head_dim",
    ),
    (
        INNER,
        "intermediate_size ffn_dim n_inner d_ff ffn_hidden_size inner_size encoder_ffn_dim decoder_ffn_dim dim_ff dff "
        "moe_intermediate_size shared_expert_intermediate_size intermediate_size_mlp shared_intermediate_size "
        "moe_shared_expert_intermediate_size expert_ffn_hidden_size dense_intermediate_size feedforward_size mlp_dim",
    ),
    (
        2,
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth num_encoder_layers "
        "num_decoder_layers num_experts_per_tok moe_top_k num_experts_per_token moe_topk top_k_experts moe_k top_k "
        "linear_num_key_heads index_n_heads",
    ),
    (
        EXPERTS,
        "num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts linear_num_value_heads",
    ),
    (1, "n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace"),
    (1, "bos_token_id moe_layer_start_index num_dense_layers mamba_n_groups"),
    (32, "q_lora_rank image_size"),
    (8, "qk_rope_head_dim rotary_dim mamba_d_state state_size ssm_state_size chunk_size mamba_chunk_size patch_size"),
    (
        5,
        "sliding_window attention_window window_size sliding_window_size attention_window_size local_attention_window "
        "swa_window_size attention_chunk_size",
    ),
    (
        256,
        "max_position_embeddings n_positions max_seq_len n_ctx seq_length max_sequence_length max_position "
        "max_target_positions",
    ),
    (0.15, "initializer_range init_std init_method_std"),
    (True, "is_decoder use_cache"),
    (2, "eos_token_id"),
    (0, "pad_token_id num_nextn_predict_layers num_mtp_layers"),
)
SMALL = {name: value for value, names in _NAMES for name in names.split()}
_WHEN_NONE = {
    "head_dim",
    "num_key_value_heads",
    "moe_intermediate_size",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}
_LATENT = {"head_dim": 8, "num_key_value_heads": HEADS}
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")

# What no rule finds: sizes that depend on each other, and layers whose kinds are told in ways of their own.
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {
        "n_group": 1,
        "num_expert_group": 1,
        "num_hidden_layers": 2,
        "mlp_layer_types": ["dense", "sparse"],
    }
    | {"layer_types": ["linear_attention", "full_attention"]},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2},
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 16, "head_dim": 16},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_ssm": 128, "mamba_n_groups": 1},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    | {"laurel_rank": 8, "intermediate_size": [96, 96], "activation_sparsity_pattern": [0.95, 0.0]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 32},
    "hrm_text": {"num_hidden_layers": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1},
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 16]},
    "roc_bert": {"shape_vocab_size": 128, "pronunciation_vocab_size": 128},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "xlnet": {"d_head": 16},
    "zamba2": {"n_mamba_heads": 8, "mamba_headdim": 16, "mamba_ngroups": 1, "hybrid_layer_ids": [1]},
    "zaya": {"num_experts_per_tok": 1},
}


def model_types() -> list[str]:
    """Return every model type that transformers has a causal LM for."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, **fields: Any) -> PreTrainedConfig:
    """Return a small configuration of ``model_type``.

    Args:
        model_type: One of :func:`model_types`.
        **fields: Fields to set instead, of the configuration and of its text part.
    """
    cls = CONFIG_MAPPING[model_type]
    config: PreTrainedConfig = cls(**shrunk(cls(), SPECIAL.get(model_type, {}) | fields))
    return config


def shrunk(config: PreTrainedConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """Return arguments for a small configuration like ``config``."""
    found: dict[str, Any] = {}
    values = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            found[name] = shrunk(value, fields)
        elif name in SMALL and not isinstance(value, list | dict) and (value is not None or name in _WHEN_NONE):
            found[name] = SMALL[name]
    if "kv_lora_rank" in values or "qk_rope_head_dim" in values:  # multi-head latent attention: one head for each
        found |= {n: v for n, v in _LATENT.items() if n in values}
    depth = next((values[n] for n in _LAYERS if isinstance(values.get(n), int)), 0)
    found.update(_cut(values, depth))
    found.update({k: v for k, v in fields.items() if k in values})
    return found


def _cut(values: dict[str, Any], depth: int) -> dict[str, Any]:
    """Return the lists of one entry a layer, cut to the first layer of each kind, and the number of layers left."""
    per_layer = {n: v for n, v in values.items() if isinstance(v, list | tuple) and len(v) == depth and depth > 3}
    if not per_layer:
        return {}
    kinds: dict[str, int] = {}
    for layer in range(depth):
        kinds.setdefault(repr([v[layer] for v in per_layer.values()]), layer)
    kept = sorted(kinds.values())[:4]
    if len(kept) == 1:
        kept = [0, 1]
    cut: dict[str, Any] = {n: [v[i] for i in kept] for n, v in per_layer.items()}
    return cut | {n: len(kept) for n in _LAYERS if n in values}


def tiny_model(model_type: str, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """Return a small random model of ``model_type``, none of whose parameters is constant."""
    torch.manual_seed(seed)
    config = tiny_config(model_type, **fields)
    cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    parts = [
        v for v in vars(config).values() if isinstance(v, cls.config_class) and not isinstance(config, cls.config_class)
    ]
    if parts:  # the configuration is of several models, and the causal one takes its own part
        model: PreTrainedModel = cls._from_config(parts[0], dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dtype.is_floating_point:
                parameter.nan_to_num_().add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model.eval()  # type: ignore[no-any-return]
