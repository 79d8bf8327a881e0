# SPDX-License-Identifier: BSD-3-Clause
"""Precision ``bf16``: the checkpoint's float32 matrices rounded to bfloat16, half the bytes; sums stay float32.

The products of our own (:class:`~QEfficient.compile.products.OwnFloatProducts`) multiply them. A checkpoint that holds 16 bits already is left as it is.
"""

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from QEfficient.compile.matrices import MatrixUse, matrix_uses
from QEfficient.compile.quantize import is_router
from QEfficient.compile.values import new_computed
from QEfficient.compile.weightfile import read_weight


class RoundWeights:
    """``MatMul(x, w)``, ``Gemm`` and ``Gather(w, ids)`` take ``w`` from bfloat16, laid out ``(out, in)``.

    Attributes:
        errors: ``{weight: {"bits": 16, "error": |w' - w| / |w|}}`` of the weights that have been written so far.
    """

    def __init__(self) -> None:
        self.errors: dict[str, dict[str, float]] = {}

    def apply(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Replace every match in ``model``; return it, and whether there was one."""
        graph, made, changed = model.graph, dict[tuple[str, bool], ir.Value](), False
        for match in matrix_uses(graph):
            if match.weight.dtype != ir.DataType.FLOAT or is_router(str(match.weight.name)):
                continue
            key = (str(match.weight.name), match.by_column)
            if key not in made:
                made[key] = self._rounded(graph, match)
            _read(graph, match, made[key])
            changed = True
        if changed:
            common.RemoveUnusedNodesPass()(model)
        return model, changed

    def _rounded(self, graph: ir.Graph, match: MatrixUse) -> ir.Value:
        """Return an initializer that computes itself when it is written."""
        weight, by_column, held = match.weight, match.by_column, match.weight.const_value
        if held is None:
            raise ValueError(f"{weight.name} has no value")

        def get() -> npt.NDArray[Any]:
            whole = read_weight(held)
            rounded = whole.astype(ml_dtypes.bfloat16)
            wrong = np.square(rounded.astype(np.float32) - whole).sum(dtype=np.float64)
            size = np.square(whole).sum(dtype=np.float64)
            self.errors[str(weight.name)] = {"bits": 16, "error": float((wrong / size) ** 0.5) if size else 0.0}
            made: npt.NDArray[Any] = rounded.T if by_column else rounded
            return made

        name = f"{weight.name}_{'columns_' * by_column}bfloat16"
        return new_computed(graph, name, ir.DataType.BFLOAT16, [match.rows, match.columns], get)


def _read(graph: ir.Graph, match: MatrixUse, weight: ir.Value) -> None:
    """Let a node read the rounded weight as it would read a checkpoint's."""
    node = match.node
    cast = ir.node("Cast", [weight], {"to": ir.DataType.FLOAT})
    cast.outputs[0].dtype = ir.DataType.FLOAT
    nodes = [cast]
    if node.op_type == "Gemm":
        node.attributes["transB"] = ir.AttrInt64("transB", 1)
    elif not match.is_embedding:
        nodes.append(ir.node("Transpose", cast.outputs, {"perm": [1, 0]}))
    graph.insert_before(node, nodes)
    node.replace_input_with(0 if match.is_embedding else 1, nodes[-1].outputs[0])
