# SPDX-License-Identifier: BSD-3-Clause
"""Root-mean-square norms as one kernel, and the residual sum before them in the same one, which may be ours.

ONNX Runtime does not find these chains itself, with PyTorch's ``rsqrt`` as root and reciprocal. SiLU it does find, and layer
norms are one operator already, so they are not looked for here.
"""

import onnx_ir as ir
from onnx_ir.passes import common

from QEfficient.compile.values import (
    CONTRIB,
    as_axes,
    constant,
    made_by,
    operands,
    replace_node,
    same_shape,
    scalar,
    static_dim,
    take_over,
)
from QEfficient.kernels.library import DOMAIN

NORM = "SimplifiedLayerNormalization"
SKIP_NORM = "SkipSimplifiedLayerNormalization"
OWN_NORM = "SkipNorm"


class FuseRmsNorm:
    """``w * (x * Reciprocal(Sqrt(ReduceMean(Pow(x, 2)) + e)))`` becomes ``SimplifiedLayerNormalization(x, w)``.

    1. The mean is taken over the last axis only.
    2. ``w`` is a vector as long as that axis. It may be computed: Gemma's is ``1 + w``.
    """

    def apply(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Replace every match in ``model``; return it, and whether there was one."""
        changed = False
        for node in list(model.graph):
            match = _norm(node)
            if match is None:
                continue
            x, weight, epsilon = match
            # The operator is ONNX Runtime's, but registered in the standard domain.
            fused = ir.node(NORM, [x, weight], {"axis": -1, "epsilon": epsilon, "stash_type": 1})
            replace_node(model.graph, node, fused)
            changed = True
        if changed:
            common.RemoveUnusedNodesPass()(model)
        return model, changed


class FuseSkipNorm:
    """``Add(a, b)`` and the norm of the sum become one ``SkipSimplifiedLayerNormalization``, which gives the sum too.

    1. ``a`` and ``b`` have the sum's shape, ``(B, S, D)``: nothing is broadcast.
    2. One norm takes the sum; others that there may be stay as they are.
    """

    def apply(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Replace every match in ``model``; return it, and whether there was one."""
        changed = False
        for node in list(model.graph):
            total = node.inputs[0] if node.op_type == NORM and node.inputs else None
            add = made_by(total, "Add")
            terms = operands(add)
            if add is None or terms is None or total is None or total.is_graph_output():
                continue
            if total.shape is None or len(total.shape) != 3 or not same_shape(total, *terms):
                continue
            fused = ir.node(
                SKIP_NORM,
                [*terms, node.inputs[1]],
                {"epsilon": node.attributes["epsilon"].as_float()},
                domain=CONTRIB,
                num_outputs=4,
            )
            for unused in fused.outputs[1:3]:
                unused.name = ""
            model.graph.insert_before(node, fused)
            take_over(node.outputs[0], fused.outputs[0])
            take_over(total, fused.outputs[3])
            model.graph.remove([node, add], safe=True)
            changed = True
        if changed:
            model.opset_imports.setdefault(CONTRIB, 1)
            model.graph.sort()  # the sum may have been read before the norm's place
        return model, changed


class OwnNorms:
    """``SkipSimplifiedLayerNormalization`` in float32 without a bias becomes ``SkipNorm``, which gives the norm and the sum."""

    def apply(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Replace every match in ``model``; return it, and whether there was one."""
        changed = False
        for node in list(model.graph):
            if node.op_type != SKIP_NORM or node.domain != CONTRIB or len(node.inputs) != 3 or len(node.outputs) != 4:
                continue
            if any(value is None or value.dtype != ir.DataType.FLOAT for value in node.inputs):
                continue
            epsilon = {"epsilon": node.attributes["epsilon"].as_float()}
            own = ir.node(OWN_NORM, node.inputs, epsilon, domain=DOMAIN, num_outputs=2)
            model.graph.insert_before(node, own)
            take_over(node.outputs[0], own.outputs[0])
            take_over(node.outputs[3], own.outputs[1])
            model.graph.remove(node, safe=True)
            changed = True
        if changed:
            model.opset_imports.setdefault(DOMAIN, 1)
        return model, changed


def _norm(node: ir.Node) -> tuple[ir.Value, ir.Value, float] | None:
    """Return ``x``, ``w`` and epsilon if ``node`` is the last multiplication of such a chain."""
    factors = operands(node) if node.op_type == "Mul" and not node.domain else None
    if factors is None:
        return None
    for weight, normed in (factors, factors[::-1]):
        inner = operands(made_by(normed, "Mul"))
        if inner is None or weight.shape is None or len(weight.shape) != 1:
            continue
        for x, inverse in (inner, inner[::-1]):
            epsilon = _epsilon(inverse, x)
            size = static_dim(x, -1)
            if epsilon is not None and size is not None and static_dim(weight, 0) == size:
                return x, weight, epsilon
    return None


def _epsilon(inverse: ir.Value, x: ir.Value) -> float | None:
    """Return epsilon if ``inverse`` is the reciprocal of the root of the mean square of ``x``."""
    reciprocal = made_by(inverse, "Reciprocal")
    root = made_by(reciprocal.inputs[0], "Sqrt") if reciprocal is not None else None
    terms = operands(made_by(root.inputs[0], "Add")) if root is not None else None
    if terms is None or x.shape is None:
        return None
    for mean, epsilon in (terms, terms[::-1]):
        reduce, number = made_by(mean, "ReduceMean"), scalar(epsilon)
        if reduce is None or number is None or len(reduce.inputs) != 2:
            continue
        keep = reduce.attributes.get("keepdims")
        if keep is not None and keep.as_int() != 1:
            continue
        if as_axes(constant(reduce.inputs[1]), len(x.shape)) != (len(x.shape) - 1,):
            continue
        square = operands(made_by(reduce.inputs[0], "Pow"))
        if square is not None and square[0] is x and scalar(square[1]) == 2:
            return number
    return None
