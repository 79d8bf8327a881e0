# SPDX-License-Identifier: BSD-3-Clause
"""Rows of one call with different adapters.

A call whose rows all run with one adapter binds that adapter's matrices as they are, ``A`` ``(in, r)`` and ``B`` ``(r, out)``. In any other
call the adapters in use are cut into ``C`` pieces of ``p`` ranks each, ``A`` ``(C, 1, in, p)`` and ``B`` ``(C, 1, p, out)``; every piece has
``m`` places, and each place takes one row or none. So every product is of a single row, for which ONNX Runtime reads the matrix as it is;
for several rows it packs it first, at every call. And modules that some adapters lack multiply the pieces of the others only.

1. The rows at the places are gathered, ``(C, m, 1, in)``, and multiplied by ``A`` and by ``B``.
2. A product with ones and zeros adds up what each row got at its places.

With one adapter the graph does the same with a single place, which takes all rows.

A product of our own (:mod:`QEfficient.compile.products`) takes the mask and the pieces, and does that by itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from QEfficient.compile.products import adapter_place
from QEfficient.compile.values import made_by, new_constant, operands, used_once
from QEfficient.contract import ADAPTER_MASK

_DIGITS = str.maketrans("", "", "0123456789")


class GatherAdapterPieces:
    """Let ``x @ A`` take the rows at an adapter's places wherever ``(x @ A) @ B`` is LoRA's update, ``x`` ``(B, S, in)``.

    All adapter inputs must be such pairs, each used once, or nothing is changed: what is no pair of matrices cannot be cut along its
    rank. Runs after scalings are folded and inputs joined.

    The input ``ADAPTER_MASK`` is added, ``(B, m, N)``: 1 where a place of a piece is a row's. The ``N`` pieces are those of all kinds of
    modules, one kind after the other. A place that is no row's takes the first, which gets nothing of it. With one adapter the mask
    is ``(1, 1, any)``, ones.

    Args:
        names: The adapter's inputs of the graph.

    Attributes:
        kinds: For each kind of modules, in the order of its pieces in the mask, the adapter's inputs: ``A`` and ``B`` of each module.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = frozenset(names)
        self.kinds: list[list[str]] = []

    def apply(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Rewrite every pair of ``model``; return it, and whether that was possible."""
        graph = model.graph
        inputs = [v for v in graph.inputs if v.name in self.names]
        pairs = list(_pairs(graph, inputs))
        if not pairs or 2 * len(pairs) != len(inputs):
            return model, False
        made = _Rewrite(graph)
        modules: dict[ir.Value, list[_Pair]] = {}
        for pair in pairs:
            modules.setdefault(pair.x, []).append(pair)
        kinds: dict[str, list[str]] = {}
        for group in modules.values():
            # What reads one x is of one kind, and so are the same modules of another layer.
            key = " ".join(str(pair.a.name).translate(_DIGITS) for pair in group)
            places = made.places_of(key, group[0].a)
            rows = made.rows_of(group[0], places)
            for pair in group:
                made.split(pair, rows, places)
                kinds.setdefault(key, []).extend((str(pair.a.name), str(pair.b.name)))
        self.kinds = list(kinds.values())
        common.RemoveUnusedNodesPass()(model)
        graph.sort()
        return model, True


@dataclass(frozen=True, slots=True)
class _Pair:
    """One module's update: ``first`` is ``x @ a``, ``second`` is ``first @ b``; ``rows`` names ``B`` and ``S`` of ``x``.

    Where a product of our own takes both, it is ``first`` and ``second``.
    """

    first: ir.Node
    second: ir.Node
    x: ir.Value
    a: ir.Value
    b: ir.Value
    rows: tuple[str, ...]

    @property
    def is_own(self) -> bool:
        return self.first is self.second


@dataclass(frozen=True, slots=True)
class _Places:
    """What a call computes once for all modules of a kind."""

    mask: ir.Value  # (B or 1, m, C), this kind's part of it
    rows: ir.Value  # (C, m), the row that each place takes
    sums: ir.Value  # (B or 1, C * m), 1 where a place is a row's
    fold: ir.Value  # the shape (C * m, -1)


class _Rewrite:
    """What the pairs of one graph share."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph, self.top = graph, graph[0]
        self.zero, self.one, self.two, self.rest, self.flat = (
            new_constant(graph, f"{ADAPTER_MASK}.{name}", np.array(value))
            for name, value in (("zero", [0]), ("one", [1]), ("two", [2]), ("rest", [-1]), ("flat", [0, -1]))
        )
        self.places: dict[str, _Places] = {}
        self.shapes: dict[tuple[str, ...], ir.Value] = {}
        self.mask = ir.Value(
            name=ADAPTER_MASK,
            shape=ir.Shape(["mask_rows", "places", "pieces"]),
            type=ir.TensorType(ir.DataType.FLOAT),
        )
        graph.inputs.append(self.mask)
        self.pieces = self.add(self.top, "Shape", [self.mask], start=2, end=3)
        self.before = self.zero  # pieces of the kinds so far
        # Rows with places of their own are (B, 1, in); those that share one are (1, B * S, in).
        rows = self.add(self.top, "Shape", [self.mask], start=0, end=1)
        self.separate = self.add(self.top, "Concat", [rows, self.rest, self.zero], axis=0)

    def add(
        self, before: ir.Node, op_type: str, inputs: Sequence[ir.Value], **attributes: int | Sequence[int]
    ) -> ir.Value:
        """Put an operator before a node; return what it makes."""
        node = ir.node(op_type, inputs, attributes)
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def places_of(self, kind: str, a: ir.Value) -> _Places:
        """Return the places of a kind, of whose tensors ``a`` is one: ``(C, 1, in, p)``, or ``(in, r)``, which is a single piece."""
        if kind not in self.places:
            many = self.add(self.top, "Concat", [self.one, self.add(self.top, "Shape", [a], start=0, end=-2)], axis=0)
            count = self.add(self.top, "ReduceProd", [many], keepdims=1)
            # With one adapter the mask may have fewer columns than there are kinds.
            start = self.add(self.top, "Min", [self.before, self.add(self.top, "Sub", [self.pieces, count])])
            end = self.add(self.top, "Add", [start, count])
            mask = self.add(self.top, "Slice", [self.mask, start, end, self.two])
            mine = self.add(self.top, "Transpose", [mask], perm=[0, 2, 1])  # (B or 1, C, m)
            sums = self.add(self.top, "Reshape", [mine, self.flat])
            size = self.add(self.top, "Shape", [sums], start=1, end=2)
            self.places[kind] = _Places(
                mask=mask,
                rows=self.add(self.top, "ArgMax", [mine], axis=0, keepdims=0),
                sums=sums,
                fold=self.add(self.top, "Concat", [size, self.rest], axis=0),
            )
            self.before = self.add(self.top, "Add", [self.before, count])
        return self.places[kind]

    def rows_of(self, pair: _Pair, places: _Places) -> ir.Value:
        """Gather the rows of a pair's ``x`` that are at the places."""
        rows = self.add(pair.first, "Reshape", [pair.x, self.separate])
        return self.add(pair.first, "Gather", [rows, places.rows], axis=0)

    def split(self, pair: _Pair, rows: ir.Value, places: _Places) -> None:
        """Multiply those rows instead of ``x``, and add up what each row gets."""
        if pair.is_own:
            place = pair.first.inputs.index(pair.b) + 1
            pair.first.resize_inputs(place + 1)
            pair.first.replace_input_with(place, places.mask)
            pair.a.shape = pair.b.shape = None
            return
        pair.first.replace_input_with(0, rows)
        update = pair.second.outputs[0]
        shape, (use, *_) = update.shape, tuple(update.uses())
        for value in (pair.a, pair.b, pair.first.outputs[0], update):
            value.shape = None  # of more dimensions, if there are pieces
        folded = self.add(use.node, "Reshape", [update, places.fold])
        total = self.add(use.node, "MatMul", [places.sums, folded])
        back = self.add(use.node, "Reshape", [total, self.shape_of(pair)])
        back.shape, back.type = shape, update.type
        use.node.replace_input_with(use.idx, back)

    def shape_of(self, pair: _Pair) -> ir.Value:
        """Return the shape ``(B, S, -1)``."""
        if pair.rows not in self.shapes:
            rows = self.add(pair.first, "Shape", [pair.x], start=0, end=2)
            self.shapes[pair.rows] = self.add(pair.first, "Concat", [rows, self.rest], axis=0)
        return self.shapes[pair.rows]


def _pairs(graph: ir.Graph, inputs: Sequence[ir.Value]) -> Iterator[_Pair]:
    """Yield all pairs, in the order of the graph."""
    known = {v for v in inputs if used_once(v) and v.shape is not None and len(v.shape) == 2}
    for first in tuple(graph):
        place = adapter_place(first)
        if place is not None and len(first.inputs) > place:
            x, a, b = first.inputs[0], first.inputs[place], first.inputs[place + 1]
            if x is not None and a in known and b in known:
                yield _Pair(first, first, x, a, b, (str(x.name),))
            continue
        source, product = operands(first), first.outputs[0]
        if source is None or source[1] not in known or not used_once(product) or made_by(product, "MatMul") is None:
            continue
        second = next(iter(product.uses())).node
        terms = operands(made_by(second.outputs[0], "MatMul"))
        if terms is None or terms[0] is not product or terms[1] not in known or not used_once(second.outputs[0]):
            continue
        shape = next((v.shape for v in (source[0], product, second.outputs[0]) if v.shape is not None), None)
        if shape is not None and len(shape) == 3:
            rows = tuple(str(d if isinstance(d, int) else d.value) for d in shape[:2])
            yield _Pair(
                first, second, source[0], source[1], terms[1], (str(source[0].name),) if "None" in rows else rows
            )
