# SPDX-License-Identifier: BSD-3-Clause
"""Every PEFT method and every variant of LoRA, as a configuration for a tiny Llama."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import peft
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from QEfficient.errors import UnsupportedError
from QEfficient.export.lift import refuse
from scripts.coverage.case import compare, lora
from scripts.coverage.shrink import HIDDEN, tiny_model

TARGETS = ["q_proj", "v_proj", "down_proj"]

# Fields that a method cannot do without, or whose usual values are larger than a tiny model.
_FIELDS: dict[str, dict[str, Any]] = {
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "ADALORA": {"total_step": 100},
    "IA3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "OFT": {"oft_block_size": 16, "r": 0},
    "BOFT": {"boft_block_size": 4},
    "HRA": {"r": 4},
    "VERA": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
    "PVERA": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
    "VBLORA": {"r": 4, "num_vectors": 8, "vector_length": 8, "topk": 2},
    "FOURIERFT": {"n_frequency": 32},
    "C3A": {"block_size": 16},
    "WAVEFT": {"n_frequency": 32},
    "MISS": {"r": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2, 3]},
    "DELORA": {"r": 4},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "OSF": {"effective_rank": 8},
    "POLY": {"r": 4, "n_tasks": 3, "n_skills": 2},
    "HIRA": {"r": 4},
    "GLORA": {"r": 4},
    "LILY": {"r": 4},
    "PSOFT": {"r": 8},
    "BEFT": {"target_modules": ["v_proj"]},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4, "num_tasks": 3},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "SHADOW": {"r": 4, "target_modules": None},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2, "target_modules": None},
    "CPT": {"cpt_token_ids": [3, 4, 5, 6], "cpt_mask": [1, 1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3, 4]},
}
_VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA all-linear": {"target_modules": "all-linear"},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "LoRA lora_bias": {"lora_bias": True},
    "LoRA embeddings and lm_head": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "LoRA modules_to_save": {"modules_to_save": ["lm_head"]},
    "LoRA trainable tokens": {"trainable_token_indices": [1, 2, 3]},
    "LoRA rank and alpha patterns": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 32}},
    "LoRA layer replication": {"layer_replication": [[0, 2], [1, 2]]},
    "LoRA bias": {"bias": "all"},
    "LoRA layers_to_transform": {"layers_to_transform": [1]},
    "LoRA target_parameters": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
}
_BASES = {"LoRA target_parameters": "mixtral"}


def _configurations() -> dict[str, Callable[..., PeftConfig]]:
    found: dict[str, Callable[..., PeftConfig]] = {}
    for name, fields in _VARIANTS.items():
        found[name] = functools.partial(lora, **{"target_modules": TARGETS, **fields})
    found["OFT without Cayley-Neumann"] = functools.partial(
        peft.OFTConfig,
        oft_block_size=16,
        r=0,
        use_cayley_neumann=False,
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
    )
    found["MiSS bat"] = functools.partial(
        peft.MissConfig, r=4, init_weights="bat", target_modules=["q_proj"], task_type="CAUSAL_LM"
    )
    for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        if kind not in {PeftType.LORA, PeftType.XLORA}:
            found[kind.value] = functools.partial(_configuration, cls, kind.value)
    return found


def _configuration(cls: type[PeftConfig], kind: str, **changed: Any) -> PeftConfig:
    fields: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if "target_modules" in inspect.signature(cls).parameters:
        fields["target_modules"] = TARGETS
    wanted = fields | _FIELDS.get(kind, {})
    if kind == PeftType.LN_TUNING.value:
        wanted.pop("target_modules")
    return cls(**{k: v for k, v in (wanted | changed).items() if v is not None})


METHODS = _configurations()
REFUSED: dict[str, Callable[..., PeftConfig]] = {
    "XLORA": functools.partial(peft.XLoraConfig, task_type="CAUSAL_LM", hidden_size=HIDDEN, adapters={"0": "adapter"}),
    "LoRA aLoRA": functools.partial(lora, alora_invocation_tokens=[5]),
    "LoRA Arrow": functools.partial(lora, arrow_config=peft.ArrowConfig()),
}
"""What cannot become inputs of a graph."""


def other_fields(config: PeftConfig) -> list[dict[str, Any]]:
    """Return fields in which a second adapter can differ from one of ``config``, the most different set first."""
    given = vars(config)
    changes: dict[str, Any] = {}
    rank = next((n for n in ("r", "num_virtual_tokens") if isinstance(given.get(n), int) and given[n] > 1), None)
    if rank is not None:
        changes[rank] = given[rank] // 2
    if isinstance(targets := given.get("target_modules"), set) and len(targets) > 1:
        changes["target_modules"] = sorted(targets)[:-1]
    changes |= {n: given[n] * 4 for n in ("alpha", "lora_alpha") if isinstance(given.get(n), int | float)}
    changes |= {n: {} for n in ("rank_pattern", "alpha_pattern") if given.get(n)}
    changes |= {n: None for n in ("modules_to_save",) if given.get(n)}
    sets = [{n: v for n, v in changes.items() if n not in left} for left in ((), (rank,), ("target_modules",))]
    sets += [{n: v for n, v in changes.items() if n not in (rank, "target_modules")}]
    return [fields for n, fields in enumerate(sets) if fields and fields not in sets[:n]]


def run_method(name: str) -> dict[str, Any]:
    """Compare a method on a tiny model; return the outcome, JSON-ready."""
    config = METHODS.get(name) or REFUSED[name]
    try:
        refuse(config())
    except UnsupportedError as e:
        return {"outcome": "refused", "reason": str(e)}
    return compare(lambda: tiny_model(_BASES.get(name, "llama")), config, other_fields(config()))
