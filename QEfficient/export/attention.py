# SPDX-License-Identifier: BSD-3-Clause
"""What transformers models call for cache, masks and attention while they are traced.

transformers asks a registry for the attention and mask functions named by ``config._attn_implementation``, and calls
``update`` on whatever cache it is given. Ours emit the ONNX operators ``TensorScatter`` and ``Attention``, with masks
made from each row's own positions. No model is named here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache
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
        context: The cache's length ``C``.
        attention_nodes: How many ``Attention`` operators were emitted so far.
    """

    position_ids: Tensor
    write_index: Tensor
    valid_length: Tensor
    context: int
    attention_nodes: int = field(default=0)


_CALL: ContextVar[Call] = ContextVar("call")


@contextmanager
def tracing(position_ids: Tensor, context: int) -> Iterator[Call]:
    """Make ``position_ids`` ``(B, S)`` and the cache length known to the attention and mask functions."""
    write_index = position_ids[:, 0].clamp(min=0)
    call = Call(position_ids, write_index, write_index + position_ids.shape[1], context)
    AttentionInterface.register(ONNX_ATTENTION, onnx_attention)
    AttentionMaskInterface.register(ONNX_ATTENTION, boolean_mask)
    AttentionMaskInterface.register(EAGER_ATTENTION, additive_mask)
    token = _CALL.set(call)
    try:
        yield call
    finally:
        _CALL.reset(token)


class GraphCache(Cache):
    """A cache whose update is a ``TensorScatter`` into a buffer of fixed length."""

    def __init__(self, states: dict[int, tuple[Tensor, ...]], write_index: Tensor) -> None:
        """Take each layer's keys and values, ``(B, H, C, D)``, and where this call writes, ``(B,)``."""
        super().__init__(layers=[])
        self.states, self.write_index = dict(states), write_index

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values, ``(B, H, S, D)``; return the whole cache of the layer, ``(B, H, C, D)``."""
        past_key, past_value = self.states[layer_idx]
        key = _scatter(past_key, key_states, self.write_index)
        value = _scatter(past_value, value_states, self.write_index)
        self.states[layer_idx] = (key, value)
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: D102 -- positions are always given
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:  # noqa: D102
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:  # noqa: D102
        return self.states[layer_idx if layer_idx in self.states else min(self.states)][0].shape[2], 0


class ShapeCache(Cache):
    """A cache that records which layers write what, ``{layer: (key shape, value shape)}``, and keeps nothing."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.shapes: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self.updates = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Record the shapes and return the inputs."""
        self.updates += 1
        self.shapes[layer_idx] = (tuple(key_states.shape), tuple(value_states.shape))
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: D102
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:  # noqa: D102
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:  # noqa: D102
        return query_length, 0


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
    **_: Any,
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

    Returns:
        ``(B, S, H, D_v)`` and no attention weights.
    """
    call = _CALL.get()
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


def boolean_mask(*, mask_function: Callable[..., Any], attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    """Return ``(B, 1, S, C)``, true where a token may attend; ``None`` for plain causal attention."""
    if mask_function is causal_mask_function and attention_mask is None:
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
    rows = torch.arange(call.position_ids.shape[0])[:, None, None, None]
    heads = torch.zeros(1, dtype=torch.int64)[None, :, None, None]
    queries = call.position_ids[:, None, :, None]
    keys = torch.arange(call.context)[None, None, None, :]
    allowed = mask_function(rows, heads, queries, keys)
    if not isinstance(allowed, Tensor):
        raise UnsupportedError(f"a mask function of this model returned {type(allowed).__name__}, not a tensor")
    return allowed.expand(call.position_ids.shape[0], 1, call.position_ids.shape[1], call.context)


def _scatter(past: Tensor, new: Tensor, write_index: Tensor) -> Tensor:
    return torch.onnx.ops.symbolic(
        "TensorScatter",
        (past, new.to(past.dtype), write_index),
        {"axis": 2, "mode": "linear"},
        dtype=past.dtype,
        shape=past.shape,
        version=OPSET,
    )


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
