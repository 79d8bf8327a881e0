# SPDX-License-Identifier: BSD-3-Clause
"""Heads that are split and joined again at once."""

import onnx_ir as ir
from onnx_ir.passes import common

from QEfficient.compile.values import constant, made_by, static_dim

_HEADS_LAST = [0, 2, 1, 3]


class FoldHeadSplits:
    """``(B, S, H * D)`` that becomes ``(B, H, S, D)`` and ``(B, S, H * D)`` again stays as it is.

    1. ``Reshape``, ``Transpose``, ``Transpose``, ``Reshape``, both transposes swapping the middle axes.
    2. The first and the last value have three dimensions, and the same last one.

    Before a kernel that wants heads last, and behind it, this is all that is left of splitting heads.
    """

    def apply(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Fold every match in ``model``; return it, and whether there was one."""
        changed = False
        for node in list(model.graph):
            source = _source(node)
            if source is None or node.outputs[0].is_graph_output():
                continue
            node.outputs[0].replace_all_uses_with(source)
            changed = True
        if changed:
            common.RemoveUnusedNodesPass()(model)
        return model, changed


def _source(node: ir.Node) -> ir.Value | None:
    """Return the value that ``node`` gives again, or ``None``."""
    if node.op_type != "Reshape" or node.domain:
        return None
    second = _swap(node.inputs[0])
    first = _swap(second.inputs[0]) if second is not None else None
    split = made_by(first.inputs[0], "Reshape") if first is not None else None
    source = split.inputs[0] if split is not None else None
    if split is None or source is None:
        return None
    by_head, flat = constant(split.inputs[1]), constant(node.inputs[1])
    if by_head is None or flat is None or by_head.size != 4 or flat.size != 3 or by_head[:2].any() or flat[:2].any():
        return None
    size = int(by_head[2] * by_head[3])
    known = static_dim(source, 2)
    is_attention = source.producer() is not None and source.producer().op_type == "GroupQueryAttention"  # type: ignore[union-attr]
    if min(by_head[2:]) < 1 or flat[2] not in {-1, size} or not (known == size or is_attention):
        return None
    return source


def _swap(value: ir.Value | None) -> ir.Node | None:
    node = made_by(value, "Transpose")
    return node if node is not None and list(node.attributes["perm"].as_ints()) == _HEADS_LAST else None
