# SPDX-License-Identifier: BSD-3-Clause
"""Weights of float32 products as the checkpoint holds them.

PyTorch's linear layers hold ``(out, in)`` and multiply by the transpose. ONNX Runtime would compute that transpose while it loads, one weight
after the other, which takes longer than all else that loading does; its own product takes a weight as it is.
"""

import onnx_ir as ir
from onnx_ir.passes import common

from QEfficient.compile.values import CONTRIB, made_by, replace_node, stored


class FuseWeightTranspose:
    """``MatMul(x, Transpose(w))`` becomes ``FusedMatMul(x, w, transB=1)``.

    ``w`` is a float32 matrix of the checkpoint, perhaps cast to float32. The kernel packs the same numbers, so results keep their bits.
    """

    def apply(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Replace every match in ``model``; return it, and whether there was one."""
        changed = False
        for node in list(model.graph):
            weight = _transposed(node)
            if weight is None:
                continue
            fused = ir.node("FusedMatMul", [node.inputs[0], weight], {"transB": 1}, domain=CONTRIB)
            replace_node(model.graph, node, fused)
            changed = True
        if changed:
            model.opset_imports.setdefault(CONTRIB, 1)
            common.RemoveUnusedNodesPass()(model)
        return model, changed


def _transposed(node: ir.Node) -> ir.Value | None:
    """Return the matrix of the checkpoint that ``node`` multiplies by the transpose of, or ``None``."""
    transpose = made_by(node.inputs[1], "Transpose") if node.op_type == "MatMul" and not node.domain else None
    weight = transpose.inputs[0] if transpose is not None else None
    if weight is None or weight.dtype != ir.DataType.FLOAT or weight.shape is None or len(weight.shape) != 2:
        return None
    return weight if stored(weight, 2) is not None else None
