# SPDX-License-Identifier: BSD-3-Clause
"""Tracing: from a skeleton to an ONNX graph that has the contract's names."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError

from QEfficient.contract import INPUT_IDS, LOGITS, POSITION_IDS, RETAINED, AdapterSpec, StateSpec
from QEfficient.errors import UnsupportedError
from QEfficient.export.attention import OPSET
from QEfficient.export.guards import check_sizes
from QEfficient.export.layers import stamp
from QEfficient.export.lift import Lifted, inner_model
from QEfficient.export.program import Fakes, Program, learn

_SHORTEST_LIMIT = 16
_FROM_DATA = re.compile(r"\bu\d+\b")


@dataclass(frozen=True, slots=True)
class Traced:
    """A traced graph and what its inputs are.

    Attributes:
        model: The graph; inputs and outputs have the contract's names; base tensors are still inputs.
        states: Cache tensors, in order.
        adapter: Adapter tensors and scalings, in order.
        base: Names of the base tensors, in order.
        one_token: Whether a call takes one token.
    """

    model: ir.Model
    states: tuple[StateSpec, ...]
    adapter: tuple[AdapterSpec, ...]
    base: tuple[str, ...]
    one_token: bool


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
    program = Program(inner_model(skeleton), lifted, adapter_name, keep_all=logits == "all")
    fakes = Fakes()
    with torch.no_grad(), _quiet(), _explained(program.inner):
        learn(program, fakes)
        model = _to_onnx(program, fakes)
    traced = program.states_of(program.traced)
    _name_ends(model, [INPUT_IDS, POSITION_IDS, *(s.name for s in traced), *program.names], traced)
    stamp(model, program.own())
    states = program.states_of(program.cached)
    adapter = tuple(
        AdapterSpec(name, _adapter_shape(t, lifted.rank_axes.get(name)), str(t.dtype).removeprefix("torch."))
        for name, t in lifted.adapter.items()
    )
    adapter += tuple(AdapterSpec(name, ()) for name in lifted.scalings)
    base = tuple(lifted.base)
    _order_ends(model, [INPUT_IDS, POSITION_IDS, *(s.name for s in states), *base, *(a.name for a in adapter)], states)
    _name_dimensions(model, states, adapter)
    return Traced(model, states, adapter, base, program.one_token)


def _to_onnx(program: Program, fakes: Fakes) -> ir.Model:
    batch, sequence, context = (torch.export.Dim(n) for n in ("batch_size", "seq_len", "ctx_len"))
    specs = program.states_of(program.traced)
    ids = {0: batch} if program.one_token else {0: batch, 1: sequence}
    axes = program.lifted.rank_axes
    ranks = [{axes[name]: torch.export.Dim.DYNAMIC} if name in axes else {} for name in program.names]
    named = {"batch_size": batch, "ctx_len": context}
    axes_of = [{i: named[d] for i, d in enumerate(spec.shape) if isinstance(d, str)} for spec in specs]
    shapes = (ids, ids, axes_of, ranks)
    tokens = (fakes.one_id, fakes.one_position) if program.one_token else (fakes.ids, fakes.positions)
    args = (*tokens, fakes.states(specs), fakes.tensors(program))
    settings: dict[str, Any] = {"strict": False, "prefer_deferred_runtime_asserts_over_guards": True}
    longest = 0
    try:
        exported = torch.export.export(program, args, dynamic_shapes=shapes, **settings)
    except UserError as e:
        config: Any = program.inner.config
        longest = int(getattr(config.get_text_config(), "max_position_embeddings", 0) or 0)
        if program.one_token or longest < _SHORTEST_LIMIT or "Constraints violated (seq_len)" not in str(e):
            raise
        # A table of positions ends where the configuration says; the manifest names that limit, sessions keep it.
        ids = {0: batch, 1: torch.export.Dim("seq_len", max=longest)}
        exported = torch.export.export(program, args, dynamic_shapes=(ids, ids, *shapes[2:]), **settings)
    check_sizes(exported, longest)
    made = torch.onnx.export(exported, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
    return made.model  # type: ignore[union-attr]


def _adapter_shape(tensor: Tensor, axis: int | None) -> tuple[int | str, ...]:
    return tuple("rank" if i == axis else n for i, n in enumerate(tensor.shape))


def _name_ends(model: ir.Model, inputs: list[str], states: tuple[StateSpec, ...]) -> None:
    # The skeleton's own parameters are state of the exported program; none is read, since all were replaced.
    for name in [n for n, v in model.graph.initializers.items() if not v.uses()]:
        model.graph.initializers.pop(name)
    for value, name in zip(model.graph.inputs, inputs, strict=True):
        value.name = name
    for value, name in zip(model.graph.outputs, [LOGITS, *(s.name + RETAINED for s in states)], strict=True):
        value.name = name


def _order_ends(model: ir.Model, inputs: list[str], states: tuple[StateSpec, ...]) -> None:
    """Put inputs and outputs in the contract's order; add inputs that nothing reads, so that none is missing."""
    given, made = {v.name: v for v in model.graph.inputs}, {v.name: v for v in model.graph.outputs}
    model.graph.inputs[:] = [given[name] for name in inputs]
    model.graph.outputs[:] = [made[name] for name in [LOGITS, *(s.name + RETAINED for s in states)]]


def _name_dimensions(model: ir.Model, states: tuple[StateSpec, ...], adapter: tuple[AdapterSpec, ...]) -> None:
    """Give symbolic dimensions the contract's names, in place of the tracer's ``s77``.

    Sizes that depend on data (``u0``: how many tokens an expert gets) stay without a name: a stamped layer has its own.
    """
    inputs = {v.name: v for v in model.graph.inputs}
    known: dict[Any, str] = {}

    def learn_name(value: ir.Value, axis: int, name: str) -> None:
        dimension = value.shape[axis] if value.shape is not None else None
        if isinstance(dimension, ir.SymbolicDim) and dimension.value is not None:
            known[dimension.value] = name

    learn_name(inputs[INPUT_IDS], 0, "batch_size")
    learn_name(inputs[INPUT_IDS], 1, "seq_len")
    for state in states:
        if "ctx_len" in state.shape:
            learn_name(inputs[state.name], state.shape.index("ctx_len"), "ctx_len")
    for spec in adapter:
        for axis, size in enumerate(spec.shape):
            if size == "rank":
                learn_name(inputs[spec.name], axis, "rank")
    values = [*model.graph.inputs, *(o for node in model.graph for o in node.outputs)]
    for value in values:
        if value.shape is not None:
            dims = [known.get(d.value, d) if isinstance(d, ir.SymbolicDim) else d for d in value.shape]
            value.shape = ir.Shape([None if _FROM_DATA.search(str(d)) else d for d in dims])


@contextmanager
def _explained(inner: nn.Module) -> Iterator[None]:
    """Say of whatever goes wrong inside PyTorch that this model cannot be exported, and why."""
    try:
        yield
    except UnsupportedError:
        raise
    except Exception as e:
        cause: BaseException = e
        while cause.__cause__ is not None:  # the exporter wraps what happened several times
            cause = cause.__cause__
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        reason = lines[0][:300] if lines else ""
        raise UnsupportedError(f"{type(inner).__name__} cannot be exported: {type(cause).__name__}: {reason}") from e


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
