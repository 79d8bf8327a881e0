# SPDX-License-Identifier: BSD-3-Clause
"""Adapter matrices with the axis that is summed over last.

A token reads every matrix of LoRA once, on one thread. Laid out as ``(in, 16)``, a row of it is one cache line, and the next row waits
for the sum of the one before; as ``(16, in)``, sixteen long rows are read at once, which memory delivers much faster.
"""

from collections.abc import Sequence

import onnx_ir as ir

from QEfficient.compile.adapters import note_transposed
from QEfficient.compile.values import CONTRIB, made_by, operands, take_over


class TransposeAdapterProducts:
    """``x @ w``, ``w`` an adapter's matrix ``(k, n)``, takes it as ``(n, k)``: a ``FusedMatMul`` with ``transB``.

    1. ``w`` is a graph input with two dimensions.
    2. It is the right operand of ``MatMul`` wherever it is used.

    Sums are added up in another order: about 1e-7 of the product. LoRA's matrices are kept as they stand in the adapter's file then.

    Args:
        names: The adapter's inputs, joined ones included.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = frozenset(names)

    def apply(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Replace every match in ``model``; return it, and whether there was one."""
        changed = False
        for value in model.graph.inputs:
            products = self._products(value)
            for node in products:
                fused = ir.node("FusedMatMul", node.inputs, {"transB": 1}, domain=CONTRIB)
                model.graph.insert_before(node, fused)
                take_over(node.outputs[0], fused.outputs[0])
                model.graph.remove(node, safe=True)
            if products and value.shape is not None:
                value.shape = ir.Shape(reversed(list(value.shape)))
                note_transposed(value)
                changed = True
        if changed:
            model.opset_imports.setdefault(CONTRIB, 1)
        return model, changed

    def _products(self, value: ir.Value) -> list[ir.Node]:
        """Return the nodes that use ``value`` if all of them may take it transposed, else none."""
        if value.name not in self.names or value.is_graph_output() or value.shape is None or len(value.shape) != 2:
            return []
        nodes = [use.node for use in value.uses()]
        terms = [operands(made_by(node.outputs[0], "MatMul")) for node in nodes]
        return nodes if all(t is not None and t[1] is value and t[0] is not value for t in terms) else []
