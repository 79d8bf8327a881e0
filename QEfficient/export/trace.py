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
import sympy  # type: ignore[import-untyped]  # torch's own dependency: sizes are its expressions
import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError

from QEfficient.contract import INPUT_IDS, LOGITS, POSITION_IDS, RETAINED, AdapterSpec, StateSpec
from QEfficient.export.attention import OPSET
from QEfficient.export.guards import SizeError, check_sizes
from QEfficient.export.layers import stamp
from QEfficient.export.lift import Lifted, inner_model
from QEfficient.export.program import Fakes, Program, learn
from QEfficient.export.reasons import explained
from QEfficient.export.skeleton import longest_context

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
    with torch.no_grad(), _quiet(), explained(program.inner):
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
    longest = longest_context(program.inner)
    try:
        exported = _export(program, fakes)
    except (UserError, SizeError) as unlimited:
        if longest < _SHORTEST_LIMIT:
            raise
        # Tables of positions end where the configuration says; the manifest names that limit, sessions keep it.
        try:
            exported = _export(program, fakes, longest)
        except (UserError, SizeError):
            raise unlimited from None
    made = torch.onnx.export(exported, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
    return made.model  # type: ignore[union-attr]


def _export(program: Program, fakes: Fakes, longest: int = 0) -> torch.export.ExportedProgram:
    """Trace the program for every size, or for calls and caches of at most ``longest`` tokens."""
    limit = {"max": longest} if longest else {}
    batch = torch.export.Dim("batch_size")
    sequence, context = torch.export.Dim("seq_len", **limit), torch.export.Dim("ctx_len", **limit)
    specs = program.states_of(program.traced)
    ids = {0: batch} if program.one_token else {0: batch, 1: sequence}
    axes = program.lifted.rank_axes
    ranks = [{axes[name]: torch.export.Dim.DYNAMIC} if name in axes else {} for name in program.names]
    named = {"batch_size": batch, "ctx_len": context}
    axes_of = [{i: named[d] for i, d in enumerate(spec.shape) if isinstance(d, str)} for spec in specs]
    tokens = (fakes.one_id, fakes.one_position) if program.one_token else (fakes.ids, fakes.positions)
    exported = torch.export.export(
        program,
        (*tokens, fakes.states(specs), fakes.tensors(program)),
        dynamic_shapes=(ids, ids, axes_of, ranks),
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    check_sizes(exported, longest, _fits(exported, specs))
    return exported


def _fits(exported: torch.export.ExportedProgram, specs: tuple[StateSpec, ...]) -> Any:
    """Return the condition that a call's tokens fit into the cache, on the sizes of a traced program; or ``None``."""
    made = {node.name: node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder"}
    ids, _, *states = (made[name] for name in exported.graph_signature.user_inputs)
    caches = [
        s.shape[spec.shape.index("ctx_len")] for s, spec in zip(states, specs, strict=False) if "ctx_len" in spec.shape
    ]
    sequence = ids.shape[1]
    sized = caches and isinstance(sequence, torch.SymInt) and isinstance(caches[0], torch.SymInt)
    return sympy.Le(sequence.node.expr, caches[0].node.expr) if sized else None


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
