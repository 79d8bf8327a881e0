# SPDX-License-Identifier: BSD-3-Clause
"""Rows of one call with different adapters.

The adapters of a call stand side by side along the rank: ``A`` is ``(in, R)``, ``B`` is ``(R, out)``, ``R`` the sum of all ranks.
Between the two products a mask ``(batch_size, 1, R)`` keeps each row's own ranks. One pair of dense products serves any mix; ranks are
not padded to a common one, rows of one adapter share its tensors, and the base is a row of zeros.
"""

from collections.abc import Sequence

import onnx_ir as ir

from QEfficient.compile.values import made_by, operands, used_once
from QEfficient.contract import ADAPTER_MASK


class MaskAdapterRanks:
    """Multiply ``x @ A`` by a mask wherever ``(x @ A) @ B`` is LoRA's update; runs after scalings are folded and inputs joined.

    All adapter inputs must be such pairs, each used once, or nothing is changed: a tensor that has no rank cannot carry a mix.

    Args:
        parts: For each adapter input of the graph, how many of the adapter's tensors it joins.
    """

    def __init__(self, parts: dict[str, int]) -> None:
        self.parts = parts

    def apply(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Mask every pair of ``model``; return it, and whether that was possible."""
        graph = model.graph
        inputs = [v for v in graph.inputs if v.name in self.parts]
        pairs = [pair for v in inputs if (pair := self._pair(v, inputs)) is not None]
        if not inputs or 2 * len(pairs) != len(inputs):
            return model, False
        mask = ir.Value(
            name=ADAPTER_MASK,
            shape=ir.Shape(["mask_rows", 1, "rank"]),
            type=ir.TensorType(ir.DataType.FLOAT),
        )
        graph.inputs.append(mask)
        wide = {1: mask}
        for product, count in pairs:
            if count not in wide:
                node = ir.node("Concat", [mask] * count, {"axis": -1})
                graph.insert_before(graph[0], node)
                wide[count] = node.outputs[0]
            masked = ir.node("Mul", [product, wide[count]])
            user = next(iter(product.uses())).node
            product.replace_all_uses_with(masked.outputs[0])
            masked.replace_input_with(0, product)
            graph.insert_before(user, masked)
        return model, True

    def _pair(self, value: ir.Value, inputs: Sequence[ir.Value]) -> tuple[ir.Value, int] | None:
        """Return ``x @ value`` and the number of joined parts, if that is only multiplied by another adapter input."""
        if not used_once(value) or value.shape is None or len(value.shape) != 2:
            return None
        first = next(iter(value.uses())).node
        terms = operands(made_by(first.outputs[0], "MatMul"))
        if terms is None or terms[1] is not value or not used_once(first.outputs[0]):
            return None
        second = next(iter(first.outputs[0].uses())).node
        terms = operands(made_by(second.outputs[0], "MatMul"))
        if terms is None or terms[0] is not first.outputs[0] or not any(terms[1] is v for v in inputs):
            return None
        return (first.outputs[0], self.parts[str(value.name)]) if used_once(terms[1]) else None
