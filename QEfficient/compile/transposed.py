# SPDX-License-Identifier: BSD-3-Clause
"""LoRA's ``A`` matrices with the long axis last.

For one row, ``(in, rank)`` and ``(rank, in)`` take the same time. For several the second is faster, three times so for matrices that were
joined: ONNX Runtime packs a right operand that is no constant at every call. For ``B``, ``(rank, out)`` is the faster one, so those stay (``docs/performance.md``).
"""

from collections.abc import Sequence

import onnx_ir as ir

from QEfficient.compile.adapters import note_transposed
from QEfficient.compile.values import CONTRIB, made_by, operands, take_over


class TransposeAdapterProducts:
    """``x @ w``, ``w`` an adapter's matrix ``(in, rank)``, takes it as ``(rank, in)``: a ``FusedMatMul`` with ``transB``.

    1. ``w`` is a graph input with two dimensions, the second one dynamic, the first one not.
    2. It is the right operand of ``MatMul`` wherever it is used.

    Sums are added up in another order: about 1e-7 of the product. The matrix stands as in the adapter's file then.

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
        shape = list(value.shape) if value.shape is not None else []
        if (
            value.name not in self.names
            or value.is_graph_output()
            or [isinstance(d, int) for d in shape] != [True, False]
        ):
            return []
        nodes = [use.node for use in value.uses()]
        terms = [operands(made_by(node.outputs[0], "MatMul")) for node in nodes]
        return nodes if all(t is not None and t[1] is value and t[0] is not value for t in terms) else []
