# SPDX-License-Identifier: BSD-3-Clause
"""Tracing: a model's forward on fake tensors, every tensor of it an input, as an ONNX graph with the contract's names."""

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from QEfficient.contract import INPUT_IDS, LOGITS, POSITION_IDS, RETAINED, AdapterSpec, StateSpec
from QEfficient.errors import UnsupportedError
from QEfficient.export.attention import EAGER_ATTENTION, ONNX_ATTENTION, OPSET, GraphCache, ShapeCache, tracing
from QEfficient.export.lift import Lifted, inner_model, rank_axis

# Sizes of the example inputs. They leave no trace in the graph, as long as none is 0 or 1 and no two are equal.
_BATCH, _SEQUENCE, _CONTEXT, _RANK = 2, 3, 11, 5


@dataclass(frozen=True, slots=True)
class Traced:
    """A traced graph and what its inputs are.

    Attributes:
        model: The graph; inputs and outputs have the contract's names; base tensors are still inputs.
        states: Cache tensors, in order.
        adapter: Adapter tensors and scalings, in order.
        base: Names of the base tensors that the graph reads, in order.
    """

    model: ir.Model
    states: tuple[StateSpec, ...]
    adapter: tuple[AdapterSpec, ...]
    base: tuple[str, ...]


def trace(skeleton: nn.Module, lifted: Lifted, adapter_name: str | None, *, logits: str) -> Traced:
    """Trace ``skeleton`` into an ONNX graph that keeps the contract.

    Args:
        skeleton: From :func:`skeleton_of`; changed by this call.
        lifted: From :func:`lift` on the same skeleton.
        adapter_name: The adapter that was lifted, if any.
        logits: ``"last"`` or ``"all"``.

    Raises:
        UnsupportedError: PyTorch or ONNX cannot express something that the model does; says what.
    """
    inner = inner_model(skeleton)
    program = _Program(inner, lifted, adapter_name, keep_all=logits == "all")
    fakes = _Fakes(lifted)
    with torch.no_grad(), _quiet():
        states = _discover_states(program, fakes)
        exported = _export(program, fakes, states)
        model = torch.onnx.export(exported, dynamo=True, opset_version=OPSET, optimize=False, verbose=False).model  # type: ignore[union-attr]
    adapter = tuple(AdapterSpec(name, _adapter_shape(name, t)) for name, t in lifted.adapter.items())
    adapter += tuple(AdapterSpec(name, ()) for name in lifted.scalings)
    names = [INPUT_IDS, POSITION_IDS, *(s.name for s in states), *lifted.base, *(a.name for a in adapter)]
    _name_inputs(model, names)
    _name_outputs(model, states)
    _name_dimensions(model, adapter)
    return Traced(model, states, adapter, tuple(lifted.base))


class _Program(nn.Module):
    """The traced function: ``(ids, positions, states, base, adapter, scalings) -> (logits, states)``."""

    def __init__(self, inner: nn.Module, lifted: Lifted, adapter_name: str | None, *, keep_all: bool) -> None:
        super().__init__()
        self.inner = inner
        self.lifted, self.adapter_name, self.keep_all = lifted, adapter_name, keep_all
        self.accepts = inspect.signature(inner.forward).parameters

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        states: list[Tensor],
        base: list[Tensor],
        adapter: list[Tensor],
        scalings: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        with tracing(position_ids, states[0].shape[2]) as call:
            cache = GraphCache(states[0::2], states[1::2], call.write_index)
            out = self.run(input_ids, position_ids, cache, base, adapter, scalings)
        return out, [t for pair in zip(cache.keys, cache.values, strict=True) for t in pair]

    def run(
        self, input_ids: Tensor, position_ids: Tensor, cache: Any, base: Any, adapter: Any, scalings: Any
    ) -> Tensor:
        """Call the model with every tensor replaced, and return its logits."""
        named = dict(zip(self.lifted.base, base, strict=True)) | dict(zip(self.lifted.adapter, adapter, strict=True))
        tensors = {path: named[name] for path, name in self.lifted.sites.items()}
        for (_, path), scaling in zip(self.lifted.scaling_sites.items(), scalings, strict=True):
            self.inner.get_submodule(path).scaling[self.adapter_name] = scaling  # type: ignore[union-attr, index]
        kwargs: dict[str, Any] = {"input_ids": input_ids, "past_key_values": cache, "use_cache": True}
        if "position_ids" in self.accepts:
            kwargs["position_ids"] = position_ids.clamp(min=0)
        with self._last_token_only(position_ids):
            out = torch.func.functional_call(self.inner, tensors, (), kwargs, tie_weights=False)
        return out.logits  # type: ignore[no-any-return]

    @contextmanager
    def _last_token_only(self, position_ids: Tensor) -> Iterator[None]:
        """Have the output projection see each row's last real token only: the others' logits are not asked for."""
        head = self.inner.get_output_embeddings()  # type: ignore[operator]
        if self.keep_all:
            yield
            return
        if head is None:
            raise UnsupportedError(f"{type(self.inner).__name__} names no output embeddings; export with logits='all'")
        last, rows = position_ids.argmax(1), torch.arange(position_ids.shape[0])
        hook = head.register_forward_pre_hook(lambda _, args: (args[0][rows, last].unsqueeze(1), *args[1:]))
        try:
            yield
        finally:
            hook.remove()


class _Fakes:
    """Fake tensors: shapes and types without memory, for everything that goes into a trace."""

    def __init__(self, lifted: Lifted) -> None:
        self.mode = FakeTensorMode(shape_env=ShapeEnv())
        self.base = [self._like(t, tuple(t.shape)) for t in lifted.base.values()]
        self.adapter = [self._like(t, _example_shape(name, t)) for name, t in lifted.adapter.items()]
        with self.mode:
            self.scalings = [torch.ones(()) for _ in lifted.scalings]
            self.ids = torch.zeros(_BATCH, _SEQUENCE, dtype=torch.int64)
            self.positions = torch.zeros(_BATCH, _SEQUENCE, dtype=torch.int64)

    def _like(self, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        meta = torch.empty(shape, dtype=tensor.dtype, device="meta")
        return self.mode.fake_tensor_converter.from_meta_and_device(self.mode, meta, torch.device("cpu"))

    def states(self, specs: tuple[StateSpec, ...]) -> list[Tensor]:
        sizes = {"batch_size": _BATCH, "ctx_len": _CONTEXT}
        with self.mode:
            return [torch.zeros([sizes.get(d, d) if isinstance(d, str) else d for d in s.shape]) for s in specs]


def _discover_states(program: _Program, fakes: _Fakes) -> tuple[StateSpec, ...]:
    """Run the model once on fake tensors to learn its cache, and which attention implementation suits it."""
    cache = ShapeCache()
    _set_attention(program.inner, ONNX_ATTENTION)
    with fakes.mode, tracing(fakes.positions, _SEQUENCE) as call:
        program.run(fakes.ids, fakes.positions, cache, fakes.base, fakes.adapter, fakes.scalings)
    if not cache.shapes:
        raise UnsupportedError(f"{type(program.inner).__name__} keeps no key/value cache that we know how to export")
    if call.attention_nodes < len(cache.shapes):
        _set_attention(program.inner, EAGER_ATTENTION)
    states = []
    for layer, (key, value) in sorted(cache.shapes.items()):
        for name, shape in (("past_key", key), ("past_value", value)):
            states.append(StateSpec(f"{name}.{layer}", ("batch_size", shape[1], "ctx_len", shape[3])))
    return tuple(states)


def _set_attention(inner: nn.Module, implementation: str) -> None:
    for module in inner.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            config._attn_implementation = implementation


def _export(program: _Program, fakes: _Fakes, states: tuple[StateSpec, ...]) -> torch.export.ExportedProgram:
    batch, sequence, context = (torch.export.Dim(n) for n in ("batch_size", "seq_len", "ctx_len"))
    dynamic = torch.export.Dim.DYNAMIC
    ids = {0: batch, 1: sequence}
    ranks = [{a: dynamic} if (a := rank_axis(name)) is not None else {} for name in program.lifted.adapter]
    shapes = (
        ids,
        ids,
        [{0: batch, 2: context} for _ in states],
        [{}] * len(fakes.base),
        ranks,
        [{}] * len(fakes.scalings),
    )
    args = (fakes.ids, fakes.positions, fakes.states(states), fakes.base, fakes.adapter, fakes.scalings)
    try:
        return torch.export.export(program, args, dynamic_shapes=shapes, strict=False)
    except UnsupportedError:
        raise
    except Exception as e:
        reason = str(e).strip().splitlines()[0][:300]
        raise UnsupportedError(
            f"PyTorch cannot trace {type(program.inner).__name__}: {type(e).__name__}: {reason}"
        ) from e


def _example_shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    axis = rank_axis(name)
    return tuple(_RANK if i == axis else n for i, n in enumerate(tensor.shape))


def _adapter_shape(name: str, tensor: Tensor) -> tuple[int | str, ...]:
    axis = rank_axis(name)
    return tuple("rank" if i == axis else n for i, n in enumerate(tensor.shape))


def _name_inputs(model: ir.Model, names: list[str]) -> None:
    # The skeleton's own parameters are state of the exported program; none is read, since all were replaced.
    for name in list(model.graph.initializers):
        value = model.graph.initializers[name]
        if not value.uses():
            model.graph.initializers.pop(name)
    for value, name in zip(model.graph.inputs, names, strict=True):
        value.name = name


def _name_outputs(model: ir.Model, states: tuple[StateSpec, ...]) -> None:
    names = [LOGITS, *(s.name + RETAINED for s in states)]
    for value, name in zip(model.graph.outputs, names, strict=True):
        value.name = name


def _name_dimensions(model: ir.Model, adapter: tuple[AdapterSpec, ...]) -> None:
    """Give symbolic dimensions the contract's names, in place of the tracer's ``s77``."""
    inputs = {v.name: v for v in model.graph.inputs}
    known: dict[Any, str] = {}

    def learn(value: ir.Value, axis: int, name: str) -> None:
        dimension = value.shape[axis] if value.shape is not None else None
        if isinstance(dimension, ir.SymbolicDim) and dimension.value is not None:
            known[dimension.value] = name

    learn(inputs[INPUT_IDS], 0, "batch_size")
    learn(inputs[INPUT_IDS], 1, "seq_len")
    learn(model.graph.inputs[2], 2, "ctx_len")
    for spec in adapter:
        for axis, size in enumerate(spec.shape):
            if size == "rank":
                learn(inputs[spec.name], axis, "rank")
    values = [*model.graph.inputs, *(o for node in model.graph for o in node.outputs)]
    for value in values:
        if value.shape is not None:
            dims = [known.get(d.value, d) if isinstance(d, ir.SymbolicDim) else d for d in value.shape]
            value.shape = ir.Shape(dims)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's chatter (missing torchvision, deprecations inside PyTorch) off the terminal."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
