# SPDX-License-Identifier: BSD-3-Clause
"""What transformers models call for masks and attention while they are traced.

transformers asks a registry for the attention and mask functions named by ``config._attn_implementation``. Ours emit the
ONNX operator ``Attention``, with masks made from each row's own positions. No model is named here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from QEfficient.errors import UnsupportedError

ONNX_ATTENTION = "qeff_onnx"
"""Attention implementation that emits the ``Attention`` operator."""

EAGER_ATTENTION = "qeff_eager"
"""For models whose attention is written out: they get an additive mask and keep their own arithmetic."""

OPSET = 24


@dataclass(slots=True)
class Call:
    """The traced call in progress: what attention and masks need to know about its rows.

    Attributes:
        position_ids: ``(B, S)``, with -1 for padding.
        write_index: ``(B,)``: where this call's first token goes in the cache.
        valid_length: ``(B,)``: cache entries that may be attended to after this call.
        context: The cache's length ``C``; ``None`` if there is nothing to attend to.
        attention_nodes: How many ``Attention`` operators were emitted so far.
    """

    position_ids: Tensor
    write_index: Tensor
    valid_length: Tensor
    context: int | None
    attention_nodes: int = field(default=0)


_CALL: ContextVar[Call] = ContextVar("call")


@contextmanager
def tracing(position_ids: Tensor, context: int | None) -> Iterator[Call]:
    """Make ``position_ids`` ``(B, S)`` and the cache length known to the attention and mask functions."""
    write_index = position_ids[:, 0].clamp(min=0)
    call = Call(position_ids, write_index, write_index + position_ids.shape[1], context)
    AttentionInterface.register(ONNX_ATTENTION, onnx_attention)
    AttentionInterface.register(EAGER_ATTENTION, onnx_attention)
    AttentionMaskInterface.register(ONNX_ATTENTION, boolean_mask)
    AttentionMaskInterface.register(EAGER_ATTENTION, additive_mask)
    token = _CALL.set(call)
    try:
        yield call
    finally:
        _CALL.reset(token)


def onnx_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Emit ``Attention`` for transformers' attention interface.

    Args:
        module: The attention layer.
        query: ``(B, H, S, D)``.
        key: The whole cache, ``(B, H_kv, C, D)``.
        value: ``(B, H_kv, C, D_v)``.
        attention_mask: ``None`` for plain causal attention; else ``(B, 1, S, C)``, boolean or additive.
        scaling: Factor of the scores; default ``1 / sqrt(D)``.
        dropout: Ignored: the model is not training.
        softcap: Bound of the scores, if the model has one.
        s_aux: Attention sinks, ``(H,)``: computed in plain operators, since ``Attention`` has none.
        **others: What models pass along; what would change the result is refused.

    Returns:
        ``(B, S, H, D_v)`` and no attention weights.
    """
    call = _CALL.get()
    if unknown := [name for name in ("position_bias", "head_mask") if others.get(name) is not None]:
        raise UnsupportedError(f"the model gives its attention {' and '.join(unknown)}, which is not exported")
    if s_aux is not None:
        return _sink_attention(query, key, value, attention_mask, scaling, s_aux), None
    attributes: dict[str, Any] = {"is_causal": int(attention_mask is None)}
    if scaling is not None:
        attributes["scale"] = float(scaling)
    if softcap:
        attributes["softcap"] = float(softcap)
    out = torch.onnx.ops.symbolic(
        "Attention",
        (query, key, value, attention_mask, None, None, call.valid_length),
        attributes,
        dtype=query.dtype,
        shape=(*query.shape[:3], value.shape[-1]),
        version=OPSET,
    )
    call.attention_nodes += 1
    return out.transpose(1, 2), None


def boolean_mask(
    *,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **_: Any,
) -> Tensor | None:
    """Return ``(B, 1, S, C)``, true where a token may attend; ``None`` for plain causal attention, if that will do."""
    if mask_function is causal_mask_function and attention_mask is None and allow_is_causal_skip:
        return None
    return _evaluate(mask_function)


def additive_mask(*, mask_function: Callable[..., Any], dtype: torch.dtype = torch.float32, **_: Any) -> Tensor:
    """Return ``(B, 1, S, C)``, 0 where a token may attend and the lowest number elsewhere."""
    allowed = _evaluate(mask_function)
    lowest = torch.full((), torch.finfo(dtype).min, dtype=dtype)
    return torch.where(allowed, torch.zeros((), dtype=dtype), lowest)


def _evaluate(mask_function: Callable[..., Any]) -> Tensor:
    """Evaluate a transformers mask function at each row's own positions, by broadcasting."""
    call = _CALL.get()
    context = call.position_ids.shape[1] if call.context is None else call.context
    rows = torch.arange(call.position_ids.shape[0])[:, None, None, None]
    heads = torch.zeros(1, dtype=torch.int64)[None, :, None, None]
    queries = call.position_ids[:, None, :, None]
    keys = torch.arange(context)[None, None, None, :]
    allowed = mask_function(rows, heads, queries, keys)
    if not isinstance(allowed, Tensor):
        raise UnsupportedError(f"a mask function of this model returned {type(allowed).__name__}, not a tensor")
    return allowed.expand(call.position_ids.shape[0], 1, call.position_ids.shape[1], context)


def _sink_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, sinks: Tensor
) -> Tensor:
    if mask is None:
        mask = _evaluate(causal_mask_function)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
    scores = torch.where(mask, scores, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    sink = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1).to(scores.dtype)
    weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    return (weights @ value).transpose(1, 2)
