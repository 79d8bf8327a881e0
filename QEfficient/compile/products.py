# SPDX-License-Identifier: BSD-3-Clause
"""Products by operators of our own, compiled for the machine (:mod:`QEfficient.kernels`): weights in blocks, and in 16-bit floats.

The weights stay as they are laid out, and are read where the file is mapped. With blocks, a row's result does not depend on the rows beside it.
"""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common

from QEfficient.compile.adapters import part_starts
from QEfficient.compile.matrices import MatrixUse, matrix_uses, replace_product, with_bias
from QEfficient.compile.values import CONTRIB, operands, replace_node, two_products, used_once
from QEfficient.kernels.library import DOMAIN

_SAME = ("K", "N", "bits", "block_size")
_SMALLEST_BLOCK = 32
_IN_BLOCKS = "BlockProduct"
_OF_FLOATS: dict[ir.DataType | None, str] = {
    ir.DataType.BFLOAT16: "Bfloat16Product",
    ir.DataType.FLOAT16: "Float16Product",
}
_ADAPTER = {_IN_BLOCKS: 5} | dict.fromkeys(_OF_FLOATS.values(), 3)
_GROUPS = 4
"""The place of ``MatMulNBits``' input that says which column is in which group; we never give it."""


class OwnProducts:
    """``MatMulNBits`` becomes ``BlockProduct``, where blocks have 32 weights or more.

    Both round activations to 8 bits in blocks and multiply integers.
    """

    def apply(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Replace every match in ``model``; return it, and whether there was one."""
        changed = False
        for node in list(model.graph):
            if node.op_type != "MatMulNBits" or node.domain != CONTRIB:
                continue
            if node.attributes["block_size"].as_int() < _SMALLEST_BLOCK:
                continue
            inputs = [*node.inputs[:_GROUPS], *node.inputs[_GROUPS + 1 :]]
            own = ir.node(_IN_BLOCKS, inputs, {n: node.attributes[n].as_int() for n in _SAME}, domain=DOMAIN)
            replace_node(model.graph, node, own)
            changed = True
        if changed:
            model.opset_imports.setdefault(DOMAIN, 1)
        return model, changed


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
    ``BlockProduct`` takes both in 16-bit floats, half the bytes that a token reads: off by 5e-4 of an adapter's weight at most, less than
    the blocks of the base are by far. Products of floats take them as they are.

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
            for tensor in tensors:
                tensor.dtype = ir.DataType.FLOAT16
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


def adapter_place(node: ir.Node | None) -> int | None:
    """Return the place of the input ``A`` if ``node`` is a product of ours, else ``None``; ``B`` and the places of the rows follow."""
    return _ADAPTER.get(node.op_type) if node is not None and node.domain == DOMAIN else None
