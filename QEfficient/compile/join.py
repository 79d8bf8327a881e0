# SPDX-License-Identifier: BSD-3-Clause
"""Queries, keys and values from one matrix product.

With weights in blocks, a token is bound by the number of kernels as much as by their size: keys and values of grouped queries
are small products. Their rows of blocks are put behind those of the queries, and the attention kernel takes all
three packed. The adapter follows: its A matrices stand side by side, its B matrices on a diagonal.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from QEfficient.compile.adapters import drop_unused_parts, note_parts
from QEfficient.compile.values import (
    CONTRIB,
    made_by,
    new_computed,
    operands,
    take_over,
    trimmed,
    two_products,
    used_once,
)
from QEfficient.compile.weightfile import read_weight

_SAME = ("K", "bits", "block_size", "accuracy_level")


class JoinAttentionProjections:
    """Three ``MatMulNBits`` before a ``GroupQueryAttention``, with LoRA or without, become one.

    1. All three take the same input, in blocks of the same kind, and go nowhere else.
    2. A branch of LoRA, ``(x @ A) @ B`` with adapter inputs that are used there only, may be at any of the three.

    Args:
        names: The adapter's inputs.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = frozenset(names)

    def apply(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Join every match in ``model``; return it, and whether there was one."""
        changed = False
        for node in list(model.graph):
            if node.op_type != "GroupQueryAttention" or node.domain != CONTRIB:
                continue
            branches = [self._branch(value) for value in node.inputs[:3]]
            found = [b for b in branches if b is not None]
            if len(found) == 3 and _alike(found):
                _join(model.graph, node, found)
                changed = True
        if changed:
            common.RemoveUnusedNodesPass()(model)
            drop_unused_parts(model)
        return model, changed

    def _branch(self, value: ir.Value | None) -> "_Branch | None":
        if value is None or not used_once(value):
            return None
        base = _in_blocks(value)
        if base is not None:
            return _Branch(base, None, None)
        terms = operands(made_by(value, "Add"))
        for product, update in (terms, terms[::-1]) if terms is not None else ():
            base, matrices = _in_blocks(product), two_products(update)
            if base is None or matrices is None or not used_once(product) or matrices[0] is not base.inputs[0]:
                continue
            if self._is_tensor(matrices[1]) and self._is_tensor(matrices[2]):
                return _Branch(base, matrices[1], matrices[2])
        return None

    def _is_tensor(self, value: ir.Value) -> bool:
        """Whether ``value`` is an adapter's matrix, laid out for the product."""
        known = value.name in self.names and value.is_graph_input() and used_once(value)
        return known and value.shape is not None and len(value.shape) == 2


@dataclass(frozen=True, slots=True)
class _Branch:
    """A projection: the base's product, and LoRA's matrices ``A`` ``(in, r)`` and ``B`` ``(r, out)``, or ``None``."""

    base: ir.Node
    a: ir.Value | None
    b: ir.Value | None

    @property
    def width(self) -> int:
        return self.base.attributes["N"].as_int()

    def part(self, index: int) -> ir.Value | None:
        return self.base.inputs[index] if index < len(self.base.inputs) else None


def _in_blocks(value: ir.Value) -> ir.Node | None:
    node = value.producer()
    return node if node is not None and node.op_type == "MatMulNBits" and node.domain == CONTRIB else None


def _alike(branches: list[_Branch]) -> bool:
    first = branches[0]
    return all(
        b.base.inputs[0] is first.base.inputs[0]
        and all(b.base.attributes[n].as_int() == first.base.attributes[n].as_int() for n in _SAME)
        and all((b.part(i) is None) == (first.part(i) is None) for i in (3, 5))
        for b in branches
    )


def _join(graph: ir.Graph, attention: ir.Node, branches: list[_Branch]) -> None:
    first = branches[0].base
    parts = [[b.part(i) for b in branches] for i in (1, 2, 3, 5)]
    data, scales, zeros, bias = (_stacked(graph, [v for v in values if v is not None]) for values in parts)
    inputs = trimmed([first.inputs[0], data, scales, zeros, None, bias])
    sizes = {name: first.attributes[name].as_int() for name in _SAME}
    total = sum(b.width for b in branches)
    made = [ir.node("MatMulNBits", inputs, {**sizes, "N": total}, domain=CONTRIB)]
    if any(b.a is not None for b in branches):
        a, b = _adapter_inputs(graph, branches, total)
        down = ir.node("MatMul", [first.inputs[0], a])
        up = ir.node("MatMul", [down.outputs[0], b])
        made += [down, up, ir.node("Add", [made[0].outputs[0], up.outputs[0]])]
    fused = ir.Node(
        CONTRIB,
        attention.op_type,
        [made[-1].outputs[0], None, None, *attention.inputs[3:]],
        list(attention.attributes.values()),
        num_outputs=len(attention.outputs),
        name=attention.name,
    )
    graph.insert_before(attention, [*made, fused])
    for old, new in zip(attention.outputs, fused.outputs, strict=True):
        take_over(old, new)
    graph.remove(attention, safe=True)


def _adapter_inputs(graph: ir.Graph, branches: list[_Branch], total: int) -> tuple[ir.Value, ir.Value]:
    """Make the two inputs that stand for those of all branches."""
    down, up, start = [], [], 0
    for branch in branches:
        if branch.a is not None and branch.b is not None:
            down.append((branch.a, ()))
            up.append((branch.b, (start, total)))
        start += branch.width
    depth = branches[0].base.attributes["K"].as_int()
    return _input_of(graph, down, [depth, "joined_rank"]), _input_of(graph, up, ["joined_rank", total])


def _input_of(
    graph: ir.Graph, parts: Sequence[tuple[ir.Value, tuple[int, ...]]], shape: Sequence[int | str]
) -> ir.Value:
    name = _common_name([str(part.name) for part, _ in parts])
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    graph.inputs.insert(graph.inputs.index(parts[0][0]), value)
    note_parts(value, parts)
    return value


def _stacked(graph: ir.Graph, values: list[ir.Value]) -> ir.Value | None:
    """Return an initializer of all rows, computed when it is written."""
    if not values:
        return None
    tensors = [v.const_value for v in values if v.const_value is not None]
    rows = sum(t.shape.numpy()[0] for t in tensors)
    shape = [rows, *tensors[0].shape.numpy()[1:]]
    name = _common_name([str(v.name) for v in values])
    return new_computed(graph, name, tensors[0].dtype, shape, lambda: np.concatenate([read_weight(t) for t in tensors]))


def _common_name(names: Sequence[str]) -> str:
    """Return ``"a.q+k.w"`` for ``"a.q.w"`` and ``"a.k.w"``; a single name gets a mark."""
    parts = list(zip(*(name.split(".") for name in names), strict=False))
    joined = ".".join(p[0] if len(set(p)) == 1 else "+".join(p) for p in parts)
    return joined if len(names) > 1 else f"{joined}+"
