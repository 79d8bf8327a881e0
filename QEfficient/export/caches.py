# SPDX-License-Identifier: BSD-3-Clause
"""The caches that models are given while they are traced: one learns what a model keeps, one keeps it in the graph.

A state is named by its kind and its layer's index: ``past_key.0``, ``conv_state.3``. Keys and values are written by
``TensorScatter`` into buffers of fixed length. Recurrent and convolutional state is a tensor of fixed shape.
"""

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.shadow.layers import ShadowCache, ShadowLayer
from torch import Tensor, nn
from transformers import Cache

from QEfficient.errors import UnsupportedError
from QEfficient.export.attention import OPSET
from QEfficient.export.positions import PastLength

Shape = tuple[int | str, ...]
RECURRENT = ("conv_state", "recurrent_state")
"""Kinds of state that every token changes: nothing of it may be written twice, and padding must not reach it."""


class TracedCache(Cache):
    """What both caches answer alike."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0, known by its type: see positions.py."""
        return PastLength(0)

    def get_query_offset(self, layer_idx: int = 0) -> int:  # noqa: D102
        return 0

    def is_recording_past(self, layer_idx: int) -> bool:  # noqa: D102
        return False

    @property
    def is_compileable(self) -> bool:  # noqa: D102
        return False


class ShapeCache(TracedCache):
    """A cache that records which layers keep what, ``{layer: {kind: shape}}``, and keeps nothing.

    Attributes:
        shapes: Shapes with ``"batch_size"`` and ``"ctx_len"`` where these sizes go.
        updates: How often keys and values were written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[int, dict[str, Shape]] = {}
        self.updates = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Record the shapes of ``(B, H, S, D)`` and return the inputs."""
        self.updates += 1
        for kind, states in (("past_key", key_states), ("past_value", value_states)):
            self._record(layer_idx, kind, ("batch_size", states.shape[1], "ctx_len", states.shape[3]))
        return key_states, value_states

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """Record the shape of ``(B, S, D)`` and return the input."""
        self._record(layer_idx, "index_key", ("batch_size", "ctx_len", indexer_key_states.shape[2]))
        return indexer_key_states

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Record the shape of the last columns of ``(B, D, S)`` that are kept; return the input, padded to that."""
        width = kwargs.get("conv_kernel_size") or conv_states.shape[-1]
        self._record(layer_idx, _kind("conv_state", state_idx), ("batch_size", *conv_states.shape[1:-1], width))
        return torch.nn.functional.pad(conv_states, (max(0, width - conv_states.shape[-1]), 0))

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        """Record the shape of ``(B, ...)`` and return the input."""
        self._record(layer_idx, _kind("recurrent_state", state_idx), ("batch_size", *recurrent_states.shape[1:]))
        return recurrent_states

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:  # noqa: D102
        return None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:  # noqa: D102
        return None

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:  # noqa: D102
        return False

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:  # noqa: D102
        return query_length, 0

    def _record(self, layer_idx: int, kind: str, shape: Shape) -> None:
        known = self.shapes.setdefault(layer_idx, {}).setdefault(kind, shape)
        if known != shape:
            raise UnsupportedError(f"layer {layer_idx} writes {kind} twice, with shapes {known} and {shape}")


class GraphCache(TracedCache):
    """A cache whose states are inputs and outputs of the graph.

    Args:
        states: Tensors by name.
        write_index: Where this call's first token goes in each row, ``(B,)``.
        context: Length of the rows; ``None`` if no state has that dimension.
    """

    def __init__(self, states: Mapping[str, Tensor], write_index: Tensor, context: int | None) -> None:
        super().__init__()
        self.states, self.write_index, self.context = dict(states), write_index, context
        for name, state in states.items():
            if name.startswith(RECURRENT):
                # A row that begins anew, begins with nothing. This also is the only reader of what a runtime overwrites.
                begins = (write_index == 0).reshape(-1, *[1] * (state.dim() - 1))
                self.states[name] = torch.where(begins, torch.zeros((), dtype=state.dtype), state)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values, ``(B, H, S, D)``; return the whole cache of the layer, ``(B, H, C, D)``."""
        return self._write(f"past_key.{layer_idx}", key_states, 2), self._write(
            f"past_value.{layer_idx}", value_states, 2
        )

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """Write new keys of an indexer, ``(B, S, D)``; return all of them, ``(B, C, D)``."""
        return self._write(f"index_key.{layer_idx}", indexer_key_states, 1)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        """Put new columns, ``(B, D, S)``, behind the kept ones; return all, keep the last."""
        name = f"{_kind('conv_state', state_idx)}.{layer_idx}"
        columns = torch.cat([self.states[name], conv_states], -1)
        self.states[name] = columns[..., -self.states[name].shape[-1] :]
        return columns

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        """Keep and return a new state, ``(B, ...)``."""
        name = f"{_kind('recurrent_state', state_idx)}.{layer_idx}"
        self.states[name] = recurrent_states.to(self.states[name].dtype)
        return self.states[name]

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:  # noqa: D102
        return self.states.get(f"{_kind('conv_state', state_idx)}.{layer_idx}")

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:  # noqa: D102
        return self.states.get(f"{_kind('recurrent_state', state_idx)}.{layer_idx}")

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:  # noqa: D102
        return True

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:  # noqa: D102
        return (query_length if self.context is None else self.context), 0

    def _write(self, name: str, new: Tensor, axis: int) -> Tensor:
        past = self.states[name]
        self.states[name] = torch.onnx.ops.symbolic(
            "TensorScatter",
            (past, new.to(past.dtype), self.write_index),
            {"axis": axis, "mode": "linear"},
            dtype=past.dtype,
            shape=past.shape,
            version=OPSET,
        )
        return self.states[name]


class _Behind(TracedCache):
    """A cache whose layers are counted behind those of another one, in the same states."""

    def __init__(self, cache: Any, layers: int) -> None:
        super().__init__()
        self.cache, self.before = cache, layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        made: tuple[Tensor, Tensor] = self.cache.update(key_states, value_states, layer_idx + self.before)
        return made

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        sizes: tuple[int, int] = self.cache.get_mask_sizes(query_length, layer_idx)
        return sizes


def for_model(cache: Any, inner: nn.Module) -> Any:
    """Return ``cache`` in the form in which the model takes it: in a pair, where PEFT runs a second network beside it."""
    if not any(isinstance(module, ShadowLayer) for module in inner.modules()):
        return cache
    config: Any = inner.config
    return ShadowCache(base=cache, shadow=_Behind(cache, config.get_text_config().num_hidden_layers))


def _kind(kind: str, state_idx: int) -> str:
    """Return the kind of a layer's state of which there are several."""
    return f"{kind}_{state_idx}" if state_idx else kind
