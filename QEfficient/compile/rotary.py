# SPDX-License-Identifier: BSD-3-Clause
"""Rotary embedding inside the attention kernel.

The kernel takes cosines and sines as tables, one row for each position. They are computed here from the graph's own
rotary subgraph, so every way of scaling frequencies comes along. The positions that the kernel counts itself (start of the
row plus place in the call) are those of the contract, ``position_ids``, at every real token.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from QEfficient.compile.values import (
    CONTRIB,
    constant,
    made_by,
    new_constant,
    operands,
    replace_node,
    static_dim,
    used_once,
)
from QEfficient.contract import POSITION_IDS

Array = npt.NDArray[Any]

_END = np.iinfo(np.int64).max


class RotaryIntoAttention:
    """``x * cos + Concat(-x[D/2:], x[:D/2]) * sin`` of queries and keys moves into ``GroupQueryAttention``.

    1. Queries and keys are rotated with the same cosines and sines, whole heads, halves against halves.
    2. Each row of the tables depends on that position alone: between ``position_ids`` and them stand only operators that
       treat positions one by one.

    Args:
        positions: Rows of the tables, the longest context; 0 if there is no bound: nothing is replaced then.
    """

    def __init__(self, positions: int) -> None:
        self.positions = positions

    def apply(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Replace every match in ``model``; return it, and whether there was one."""
        tables: dict[tuple[int, int], tuple[ir.Value, ir.Value] | None] = {}
        changed = False
        for node in list(model.graph) if self.positions else []:
            if node.op_type != "GroupQueryAttention" or node.domain != CONTRIB or "do_rotary" in node.attributes:
                continue
            query, key = _rotated(node.inputs[0]), _rotated(node.inputs[1])
            if query is None or key is None or query[2] is not key[2] or query[3] is not key[3]:
                continue
            angles = id(query[2]), id(query[3])
            if angles not in tables:
                tables[angles] = self._tables(model.graph, query[2], query[3], static_dim(query[1], 3))
            made = tables[angles]
            if made is not None:
                _replace(model.graph, node, [query[0], key[0]], [query[1], key[1]], made)
                changed = True
        if changed:
            common.RemoveUnusedNodesPass()(model)
        return model, changed

    def _tables(
        self, graph: ir.Graph, cos: ir.Value, sin: ir.Value, head_size: int | None
    ) -> tuple[ir.Value, ir.Value] | None:
        """Return the tables of ``cos`` and ``sin``, ``(positions, D/2)``, or ``None`` if the kernel has no place for them."""
        positions = np.arange(self.positions, dtype=np.int64)[None]
        halves = []
        for value in (cos, sin):
            full = _evaluate(value, positions, {})
            if full is None or head_size is None or full.shape != (1, 1, self.positions, head_size):
                return None
            first, second = np.split(full[0, 0], 2, axis=1)
            if not np.array_equal(first, second):
                return None
            halves.append(np.ascontiguousarray(first))
        return new_constant(graph, f"{cos.name}_table", halves[0]), new_constant(graph, f"{sin.name}_table", halves[1])


def _rotated(flat: ir.Value | None) -> tuple[ir.Node, ir.Value, ir.Value, ir.Value] | None:
    """Return the ``Transpose`` behind a rotation, ``x``, cosines and sines, if ``flat`` is a rotated ``x`` with heads last."""
    reshape = made_by(flat, "Reshape")
    transpose = made_by(reshape.inputs[0], "Transpose") if reshape is not None else None
    terms = operands(made_by(transpose.inputs[0], "Add")) if transpose is not None else None
    if flat is None or transpose is None or terms is None:
        return None
    if not used_once(flat) or not used_once(transpose.outputs[0]):
        return None
    for straight, turned in (terms, terms[::-1]):
        one, other = operands(made_by(straight, "Mul")), operands(made_by(turned, "Mul"))
        if one is None or other is None:
            continue
        for x, cos in (one, one[::-1]):
            for half_turn, sin in (other, other[::-1]):
                if _is_half_turn(half_turn, x):
                    return transpose, x, cos, sin
    return None


def _is_half_turn(value: ir.Value, x: ir.Value) -> bool:
    """Whether ``value`` is ``Concat(-x[D/2:], x[:D/2])`` along the last axis."""
    concat, size = made_by(value, "Concat"), static_dim(x, -1)
    parts = operands(concat)
    if concat is None or parts is None or size is None or size % 2 or x.shape is None:
        return False
    if concat.attributes["axis"].as_int() not in {-1, len(x.shape) - 1}:
        return False
    negative = made_by(parts[0], "Neg")
    return (
        negative is not None
        and _slice_of(negative.inputs[0], x) == (size // 2, size)
        and _slice_of(parts[1], x) == (0, size // 2)
    )


def _slice_of(value: ir.Value | None, x: ir.Value) -> tuple[int, int] | None:
    """Return which part of the last axis of ``x`` ``value`` is."""
    node = made_by(value, "Slice")
    size = static_dim(x, -1)
    if node is None or size is None or node.inputs[0] is not x or x.shape is None or len(node.inputs) < 4:
        return None
    start, end, axis = (constant(v) for v in node.inputs[1:4])
    step = constant(node.inputs[4]) if len(node.inputs) > 4 else np.ones(1, np.int64)
    if any(c is None or c.size != 1 for c in (start, end, axis, step)):
        return None
    first, last, along, by = (int(c.reshape(())) for c in (start, end, axis, step) if c is not None)
    if by != 1 or along % len(x.shape) != len(x.shape) - 1:
        return None
    return first, size if last == _END else min(last, size)


def _replace(
    graph: ir.Graph,
    node: ir.Node,
    transposes: list[ir.Node],
    plain: list[ir.Value],
    tables: tuple[ir.Value, ir.Value],
) -> None:
    for transpose, x in zip(transposes, plain, strict=True):
        transpose.replace_input_with(0, x)
    fused = ir.Node(
        CONTRIB,
        node.op_type,
        [*node.inputs[:7], *tables],
        [*node.attributes.values(), ir.AttrInt64("do_rotary", 1), ir.AttrInt64("rotary_interleaved", 0)],
        num_outputs=len(node.outputs),
        name=node.name,
    )
    replace_node(graph, node, fused)


def _evaluate(value: ir.Value | None, positions: Array, known: dict[int, Array | None]) -> Array | None:
    """Return what ``value`` is for these ``position_ids``, or ``None`` if more than position by position goes into it."""
    if value is None:
        return None
    if value.is_graph_input() and value.name == POSITION_IDS:
        return positions
    if id(value) not in known:
        known[id(value)] = constant(value)
        node = value.producer()
        if known[id(value)] is None and node is not None and not node.domain and node.op_type in _EVALUATE:
            inputs = [_evaluate(v, positions, known) for v in node.inputs]
            if all(i is not None for i in inputs):
                known[id(value)] = _EVALUATE[node.op_type](node, *inputs)
    return known[id(value)]


def _cast(node: ir.Node, x: Array) -> Array:
    return x.astype(ir.DataType(node.attributes["to"].as_int()).numpy())


def _unsqueeze(node: ir.Node, x: Array, axes: Array) -> Array:
    return np.expand_dims(x, tuple(int(a) for a in axes))


def _concat(node: ir.Node, *parts: Array) -> Array:
    return np.concatenate(parts, axis=node.attributes["axis"].as_int())


def _transpose(node: ir.Node, x: Array) -> Array:
    return x.transpose(node.attributes["perm"].as_ints())


_EVALUATE: dict[str, Callable[..., Array]] = {
    "Identity": lambda _, x: x,
    "Cast": _cast,
    "Clip": lambda _, x, low, high=None: np.clip(x, low, high),
    "Unsqueeze": _unsqueeze,
    "Concat": _concat,
    "Transpose": _transpose,
    "Mul": lambda _, a, b: a * b,
    "MatMul": lambda _, a, b: a @ b,
    "Cos": lambda _, x: np.cos(x),
    "Sin": lambda _, x: np.sin(x),
}
