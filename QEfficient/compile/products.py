# SPDX-License-Identifier: BSD-3-Clause
"""Products by operators of our own, compiled for the machine (:mod:`QEfficient.kernels`): weights in blocks, and in 16-bit floats.

Weights are read where their file is mapped: blocks are laid out for that when the program is written, 16-bit floats lie there as they are in
the checkpoint. With blocks, a row's result does not depend on the rows beside it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from QEfficient.compile.adapters import part_starts
from QEfficient.compile.blocks import count_blocks, unpack
from QEfficient.compile.matrices import MatrixUse, matrix_uses, replace_product, with_bias
from QEfficient.compile.values import CONTRIB, new_computed, operands, replace_node, trimmed, two_products, used_once
from QEfficient.compile.weightfile import read_weight
from QEfficient.kernels.library import DOMAIN
from QEfficient.kernels.ranks import TAIL
from QEfficient.kernels.strips import STRIP, count_strips, data_in_strips, in_strips

Array = npt.NDArray[Any]

_SAME = ("K", "N", "bits", "block_size")
_SMALLEST_BLOCK = 32
_IN_BLOCKS = "BlockProduct"
_OF_FLOATS: dict[ir.DataType | None, str] = {
    ir.DataType.BFLOAT16: "Bfloat16Product",
    ir.DataType.FLOAT16: "Float16Product",
}
_ADAPTER = {_IN_BLOCKS: 5} | dict.fromkeys(_OF_FLOATS.values(), 3)


class OwnProducts:
    """``MatMulNBits`` becomes ``BlockProduct``, where blocks have 32 weights or more.

    Both round activations to 8 bits in blocks and multiply integers. The weights are laid out in strips (:mod:`QEfficient.kernels.strips`):
    where an embedding is one of them, ``GatherBlockQuantized`` becomes ``BlockRows``, which takes rows out of strips.
    """

    def apply(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Replace every match in ``model``; return it, and whether there was one."""
        weights: dict[ir.Value | None, _Strips] = {}
        for node in list(model.graph):
            if node.op_type != "MatMulNBits" or node.domain != CONTRIB:
                continue
            if node.attributes["block_size"].as_int() < _SMALLEST_BLOCK:
                continue
            x, data, _, _, _, bias = _six(node)
            if data not in weights:
                weights[data] = _Strips(model.graph, node)
            weight = weights[data]
            own = ir.node(_IN_BLOCKS, trimmed([x, *weight.inputs, bias]), weight.sizes, domain=DOMAIN)
            replace_node(model.graph, node, own)
        for node in list(model.graph):
            rows = node.inputs[0].producer() if node.op_type == "GatherBlockQuantized" and node.inputs[0] else None
            if rows is None or rows.inputs[0] not in weights:
                continue
            weight = weights[rows.inputs[0]]
            own = ir.node("BlockRows", trimmed([node.inputs[1], *weight.inputs]), weight.sizes, domain=DOMAIN)
            replace_node(model.graph, node, own)
        if weights:
            model.opset_imports.setdefault(DOMAIN, 1)
            common.RemoveUnusedNodesPass()(model)
        return model, bool(weights)


class _Strips:
    """The weight of a ``MatMulNBits`` as initializers that lay themselves out when they are written.

    Attributes:
        inputs: Data, scales, and zero points or ``None``.
        sizes: The operator's attributes.
    """

    def __init__(self, graph: ir.Graph, product: ir.Node) -> None:
        self.sizes = {name: product.attributes[name].as_int() for name in _SAME}
        bits, size = self.sizes["bits"], self.sizes["block_size"]
        strips, blocks = count_strips(self.sizes["N"]), count_blocks(self.sizes["K"], size)

        def laid_out(value: ir.Value | None, shape: Sequence[int], lay: Callable[[Array], Array]) -> ir.Value | None:
            if value is None or value.dtype is None or value.const_value is None:
                return None
            tensor = value.const_value
            name = f"{value.name}_in_strips"
            return new_computed(graph, name, value.dtype, (strips, *shape), lambda: lay(read_weight(tensor)))

        _, data, scales, zeros, _, _ = _six(product)
        self.inputs = [
            laid_out(data, (blocks * size * bits // 32, STRIP, 4), data_in_strips),
            laid_out(scales, (blocks, STRIP), in_strips),
            laid_out(zeros, (blocks, STRIP), lambda packed: in_strips(unpack(packed, bits)[:, :blocks])),
        ]


def _six(product: ir.Node) -> Sequence[ir.Value | None]:
    """Return the inputs of a ``MatMulNBits``: what is multiplied, data, scales, zero points, groups (we have none), bias."""
    return (*product.inputs, None, None, None)[:6]


class OwnFloatProducts:
    """Weights that the checkpoint holds in 16 bits stay so: ``MatMul(x, Transpose(Cast(w)))`` becomes ``Bfloat16Product(x, w)``.

    Otherwise ONNX Runtime would make them float32 when it loads them: twice the memory, and twice the bytes for each token to read. The
    operator multiplies the same float32 numbers, so sums differ in the order of their additions alone. ``Gather(Cast(w), ids)`` becomes
    ``Cast(Gather(w, ids))``, which gives the same bits.
    """

    def apply(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Replace every match in ``model``; return it, and whether there was one."""
        changed = False
        for match in matrix_uses(model.graph):
            if match.weight.dtype not in _OF_FLOATS or match.by_column:
                continue
            (_take_rows if match.is_embedding else _multiply)(model.graph, match)
            changed = True
        if changed:
            model.opset_imports.setdefault(DOMAIN, 1)
            common.RemoveUnusedNodesPass()(model)
        return model, changed


def _multiply(graph: ir.Graph, match: MatrixUse) -> None:
    bias, last = with_bias(graph, match)
    inputs = [match.x, match.weight, *([bias] if bias is not None else [])]
    sizes = {"K": match.columns, "N": match.rows}
    replace_product(graph, match, last, ir.node(_OF_FLOATS[match.weight.dtype], inputs, sizes, domain=DOMAIN))


def _take_rows(graph: ir.Graph, match: MatrixUse) -> None:
    rows = ir.node("Gather", [match.weight, match.x], {"axis": 0})
    graph.insert_before(match.node, rows)
    replace_node(graph, match.node, ir.node("Cast", rows.outputs, {"to": ir.DataType.FLOAT}))


class AdaptersIntoProducts:
    """``BlockProduct(x) + (x @ A) @ B`` becomes ``BlockProduct(x, A, B)``, if ``A`` and ``B`` are an adapter's and used there only.

    Where queries, keys and values are one product, ``starts`` says which columns each one's ranks add to: the zeros beside them are not read.
    ``BlockProduct`` takes both in 8 bits with a scale for each rank (:mod:`QEfficient.kernels.ranks`), a quarter of the bytes that a token
    reads: off by 1.3 % of what the adapter adds, less than rounding activations to 8 bits is of what the base gives. Products of floats
    take them as they are.

    Args:
        names: The adapter's inputs of the graph.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = frozenset(names)

    def apply(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Fuse every match in ``model``; return it, and whether there was one."""
        changed = False
        for node in list(model.graph):
            if node.op_type != "Add" or node.domain:
                continue
            terms = operands(node)
            for product, update in (terms, terms[::-1]) if terms is not None else ():
                if self._fuse(model.graph, node, product, update):
                    changed = True
                    break
        if changed:
            common.RemoveUnusedNodesPass()(model)
        return model, changed

    def _fuse(self, graph: ir.Graph, add: ir.Node, product: ir.Value, update: ir.Value) -> bool:
        base, matrices = product.producer(), two_products(update)
        place = adapter_place(base)
        if base is None or place is None or matrices is None or not used_once(product):
            return False
        x, *tensors = matrices
        if x is not base.inputs[0] or len(base.inputs) > place or not all(map(self._is_matrix, tensors)):
            return False
        if base.op_type == _IN_BLOCKS:
            for tensor, axis in zip(tensors, (0, 1), strict=True):  # the one that is not the rank's
                tensor.dtype = ir.DataType.INT8
                tensor.shape = _with_tail(tensor.shape, axis)
        inputs = [*base.inputs, *[None] * (place - len(base.inputs)), *tensors]
        attributes: dict[str, Any] = dict(base.attributes)
        if starts := part_starts(tensors[1]):
            attributes["starts"] = starts
        fused = ir.node(base.op_type, inputs, attributes, domain=DOMAIN)
        replace_node(graph, add, fused)
        return True

    def _is_matrix(self, value: ir.Value) -> bool:
        known = value.name in self.names and value.is_graph_input() and used_once(value)
        return known and value.shape is not None and len(value.shape) == 2 and value.dtype == ir.DataType.FLOAT


def _with_tail(shape: ir.Shape | None, axis: int) -> ir.Shape:
    """Return the shape of an adapter's matrix in 8 bits."""
    sizes: list[Any] = list(shape or ())
    sizes[axis] = int(sizes[axis]) + TAIL
    return ir.Shape(sizes)


def adapter_place(node: ir.Node | None) -> int | None:
    """Return the place of the input ``A`` if ``node`` is a product of ours, else ``None``; ``B`` and the places of the rows follow."""
    return _ADAPTER.get(node.op_type) if node is not None and node.domain == DOMAIN else None
