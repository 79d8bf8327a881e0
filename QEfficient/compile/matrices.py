# SPDX-License-Identifier: BSD-3-Clause
"""Where a graph multiplies by a matrix of the checkpoint, or takes rows of one."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from QEfficient.compile.values import made_by, new_constant, operands, replace_node, stored, used_once
from QEfficient.compile.weightfile import read_weight


@dataclass(frozen=True, slots=True)
class MatrixUse:
    """A node that reads a weight.

    Attributes:
        x: What is multiplied, or the rows' numbers.
        weight: The matrix, ``(rows, columns)``, or transposed if ``by_column``; a cast to float32 may lie between.
        by_column: The product is ``x @ weight``, otherwise ``x @ weight.T``.
        bias: The node's own.
        is_embedding: ``weight[x]`` is taken.
    """

    node: ir.Node
    x: ir.Value
    weight: ir.Value
    by_column: bool = False
    bias: ir.Value | None = None
    is_embedding: bool = False

    @property
    def rows(self) -> int:
        """Rows of the matrix, each of which gives one number of a product."""
        return self._size(1 if self.by_column else 0)

    @property
    def columns(self) -> int:
        """Numbers in a row."""
        return self._size(0 if self.by_column else 1)

    def _size(self, axis: int) -> int:
        tensor = self.weight.const_value
        if tensor is None:
            raise ValueError(f"{self.weight.name} has no value")
        return int(tensor.shape[axis])  # type: ignore[arg-type]


def matrix_uses(graph: ir.Graph) -> Iterator[MatrixUse]:
    """Yield what reads a matrix of the checkpoint; each may be replaced before the next is asked for."""
    for node in tuple(graph):
        match = _projection(node) or _embedding(node)
        if match is not None:
            yield match


def _projection(node: ir.Node) -> MatrixUse | None:
    """Return the product by a matrix of the checkpoint that ``node`` is, or ``None``."""
    if node.domain or node.op_type not in {"MatMul", "Gemm"} or node.inputs[0] is None:
        return None
    weight, by_column, bias = node.inputs[1], True, None
    if node.op_type == "Gemm":
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        settings = {name: a.value for name, a in node.attributes.items()}
        if settings.get("transA") or settings.get("alpha", 1.0) != 1 or settings.get("beta", 1.0) != 1:
            return None
        by_column = not settings.get("transB")
    transpose = made_by(weight, "Transpose")
    if transpose is not None and by_column:
        weight, by_column = transpose.inputs[0], False
    matrix = stored(weight, 2)
    if matrix is None:
        return None
    match = MatrixUse(node, node.inputs[0], matrix, by_column, bias)
    return match if bias is None or (bias.shape is not None and list(bias.shape) == [match.rows]) else None


def _embedding(node: ir.Node) -> MatrixUse | None:
    """Return the rows of a matrix of the checkpoint that ``node`` takes, or ``None``."""
    if node.domain or node.op_type != "Gather" or node.inputs[1] is None:
        return None
    axis = node.attributes.get("axis")
    matrix = stored(node.inputs[0], 2)
    if matrix is None or (axis is not None and axis.as_int() != 0):
        return None
    return MatrixUse(node, node.inputs[1], matrix, is_embedding=True)


def with_bias(graph: ir.Graph, match: MatrixUse) -> tuple[ir.Value | None, ir.Node]:
    """Return the bias of a product, its own or one that is added to it at once, and the last node of both.

    A bias that is cast to float32 becomes an initializer that is.
    """
    if match.bias is not None:
        return _as_float32(graph, match.bias) or match.bias, match.node
    product = match.node.outputs[0]
    add = next(iter(product.uses())).node if used_once(product) else None
    terms = operands(add) if add is not None and add.op_type == "Add" and not add.domain else None
    if add is not None and terms is not None:
        bias = _as_float32(graph, terms[1] if terms[0] is product else terms[0])
        if bias is not None and bias.shape is not None and list(bias.shape) == [match.rows]:
            return bias, add
    return None, match.node


def replace_product(graph: ir.Graph, match: MatrixUse, last: ir.Node, new: ir.Node) -> None:
    """Put ``new`` in the place of a product and what :func:`with_bias` found behind it."""
    replace_node(graph, last, new)
    if last is not match.node:
        graph.remove(match.node, safe=True)


def _as_float32(graph: ir.Graph, value: ir.Value) -> ir.Value | None:
    """Return a vector of the checkpoint, perhaps cast to float32, as an initializer of that type; ``None`` if ``value`` is none."""
    source = stored(value, 1)
    if source is None or source.const_value is None or source.dtype == ir.DataType.FLOAT:
        return source
    return new_constant(graph, f"{source.name}_float32", read_weight(source.const_value).astype(np.float32))
