# SPDX-License-Identifier: BSD-3-Clause
"""The gates of feed-forward layers as one operator of ours: ONNX Runtime takes two, and reads and writes what is between them."""

import onnx_ir as ir
from onnx_ir.passes import common

from QEfficient.compile.values import made_by, operands, replace_node, same_shape
from QEfficient.kernels.library import DOMAIN

OPERATOR = "GatedSilu"


class OwnGates:
    """``x * Sigmoid(x) * y`` of one shape becomes ``GatedSilu(x, y)``."""

    def apply(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Replace every match in ``model``; return it, and whether there was one."""
        changed = False
        for node in list(model.graph):
            match = _gate(node)
            if match is None or any(v.dtype != ir.DataType.FLOAT for v in match) or not same_shape(*match):
                continue
            replace_node(model.graph, node, ir.node(OPERATOR, [*match], domain=DOMAIN))
            changed = True
        if changed:
            model.opset_imports.setdefault(DOMAIN, 1)
            common.RemoveUnusedNodesPass()(model)
        return model, changed


def _gate(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """Return ``x`` and ``y`` if ``node`` is the last multiplication of ``x * Sigmoid(x) * y``."""
    factors = operands(node) if node.op_type == "Mul" and not node.domain else None
    if factors is None:
        return None
    for silu, up in (factors, factors[::-1]):
        inner = operands(made_by(silu, "Mul"))
        for x, weight in (inner, inner[::-1]) if inner is not None else ():
            sigmoid = made_by(weight, "Sigmoid")
            if sigmoid is not None and sigmoid.inputs[0] is x:
                return x, up
    return None
