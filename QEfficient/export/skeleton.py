# SPDX-License-Identifier: BSD-3-Clause
"""Skeletons: models with all their structure and none of their weights.

A skeleton's parameters lie on the ``meta`` device in float32; its buffers (rotary frequencies, for example) are real.
Export may change a skeleton as it likes: the model it was made from is never touched.
"""

import copy
from typing import Any

import torch
from torch import nn

from QEfficient.export.lift import beside, inner_model


def skeleton_of(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` whose parameters take no memory.

    Floating-point parameters become float32 whatever their type was; parameters that are one object stay one object.
    """
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        dtype = torch.float32 if parameter.dtype.is_floating_point else parameter.dtype
        empty = torch.empty_like(parameter, dtype=dtype, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
    for buffer in model.buffers():
        if buffer.device.type != "meta":
            memo[id(buffer)] = _plain(buffer)
    skeleton: nn.Module = copy.deepcopy(model, memo)
    for name, module in beside(skeleton).items():
        inner_model(skeleton).add_module(name, module)  # so that everything that is traced hangs on one module
    for module in skeleton.modules():
        _keep_frequencies(module)
    return skeleton.eval()


def uncounted_token(model: nn.Module) -> int | None:
    """Return the token (padding) that a model leaves out where it numbers the others itself, from the token's id + 1 on.

    RoBERTa and its kin do; None for a model that takes positions, or numbers every token.
    """
    numbering = (m for m in model.modules() if hasattr(m, "create_position_ids_from_input_ids"))
    return next((int(m.padding_idx) for m in numbering), None)  # type: ignore[arg-type]


def longest_context(model: nn.Module) -> int:
    """Return the longest context at which a model computes the same for every row of a batch; 0 if there is no limit.

    Rotary frequencies of the type ``longrope`` change for the whole batch, and not for what the cache holds already, as
    soon as its longest row is longer than the model was trained with at first. A model with an :func:`uncounted_token`
    does not use the first places of its table of positions.
    """
    text_config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    named = (
        getattr(text_config, name, None) for name in ("max_position_embeddings", "max_target_positions", "max_seq_len")
    )
    longest = next((int(n) for n in named if n), 0)
    if longest and (uncounted := uncounted_token(model)) is not None:
        longest -= uncounted + 1
    rope = getattr(text_config, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
    ends = [k.get("original_max_position_embeddings") for k in kinds if k.get("rope_type") == "longrope"]
    return min([n for n in (longest, *ends) if n], default=0)


def _keep_frequencies(module: nn.Module) -> None:
    """Have a rotary embedding stay with the frequencies that it has up to :func:`longest_context`.

    transformers updates those of some types at every call, and keeps the last ones.
    """
    kinds = getattr(module, "rope_type", None)
    for layer, kind in kinds.items() if isinstance(kinds, dict) else [("", kinds)]:
        if not isinstance(kind, str) or not ("dynamic" in kind or kind == "longrope"):
            continue
        prefix = f"{layer}_" if layer else ""
        setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq"))
        if isinstance(kinds, dict):
            kinds[layer] = "default"
        else:
            module.rope_type = "default"  # type: ignore[assignment]


def _plain(buffer: torch.Tensor) -> torch.Tensor:
    real = buffer.detach().cpu()
    return real.float().clone() if real.dtype in {torch.float16, torch.bfloat16} else real.clone()
