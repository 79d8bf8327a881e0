# SPDX-License-Identifier: BSD-3-Clause
"""Products with weights in blocks by an operator of our own, compiled for the machine (:mod:`QEfficient.kernels`).

The weights stay as they are laid out, and are read where the file is mapped. A row's result does not depend on the rows beside it.
"""

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes import common

from QEfficient.compile.values import CONTRIB, operands, replace_node, two_products, used_once
from QEfficient.kernels.library import DOMAIN

_SAME = ("K", "N", "bits", "block_size")
_SMALLEST_BLOCK = 32
OPERATOR = "BlockProduct"
ADAPTER = 5
"""The place of ``BlockProduct``'s input ``A``; ``B`` and the places of the rows follow."""
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
            own = ir.node(OPERATOR, inputs, {n: node.attributes[n].as_int() for n in _SAME}, domain=DOMAIN)
            replace_node(model.graph, node, own)
            changed = True
        if changed:
            model.opset_imports.setdefault(DOMAIN, 1)
        return model, changed


class AdaptersIntoProducts:
    """``BlockProduct(x) + (x @ A) @ B`` becomes ``BlockProduct(x, A, B)``, if ``A`` and ``B`` are an adapter's and used there only.

    The operator takes both in 16-bit floats, half the bytes that a token reads: off by 5e-4 of an adapter's weight at most, less than
    the blocks of the base are by far.

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
        if (
            base is None
            or base.op_type != OPERATOR
            or base.domain != DOMAIN
            or matrices is None
            or not used_once(product)
        ):
            return False
        x, *tensors = matrices
        if x is not base.inputs[0] or len(base.inputs) > ADAPTER or not all(map(self._is_matrix, tensors)):
            return False
        for tensor in tensors:
            tensor.dtype = ir.DataType.FLOAT16
        inputs = [*base.inputs, *[None] * (ADAPTER - len(base.inputs)), *tensors]
        fused = ir.node(OPERATOR, inputs, dict(base.attributes), domain=DOMAIN)
        replace_node(graph, add, fused)
        return True

    def _is_matrix(self, value: ir.Value) -> bool:
        known = value.name in self.names and value.is_graph_input() and used_once(value)
        return known and value.shape is not None and len(value.shape) == 2 and value.dtype == ir.DataType.FLOAT
