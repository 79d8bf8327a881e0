# SPDX-License-Identifier: BSD-3-Clause
"""Small questions and changes that the passes share: constants, shapes, one value taking the place of another."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

CONTRIB = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""
_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


def constant(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """Return what ``value`` always is, or ``None`` if it is computed."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return tensor.numpy() if tensor is not None else None


def scalar(value: ir.Value | None) -> float | None:
    """Return the one element that ``value`` always is, or ``None``."""
    if value is None or (value.producer() is None and not value.is_initializer()):
        return None
    if value.const_value is not None and value.const_value.size != 1:
        return None
    array = constant(value)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def new_constant(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """Return the initializer called ``name``, making it if there is none."""
    if name in graph.initializers:
        return graph.initializers[name]
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
    graph.register_initializer(value)
    return value


def new_computed(
    graph: ir.Graph, name: str, dtype: ir.DataType, shape: Sequence[int], get: Callable[[], npt.NDArray[Any]]
) -> ir.Value:
    """Return a new initializer called ``name`` whose elements are computed when they are written."""
    tensor = ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(get())), dtype=dtype, shape=ir.Shape(shape), name=name
    )
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def trimmed(inputs: Sequence[ir.Value | None]) -> list[ir.Value | None]:
    """Return a node's inputs without those at the end that are left out."""
    kept = [*inputs]
    while kept[-1] is None:
        kept.pop()
    return kept


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Let ``new`` stand for ``old`` wherever it is used, graph outputs included, under its name."""
    new.shape = old.shape
    new.type = old.type
    new.name, old.name = old.name, f"{old.name}_before"
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def replace_node(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """Put ``new``, with as many outputs, in the place of ``old``."""
    graph.insert_before(old, new)
    for before, after in zip(old.outputs, new.outputs, strict=True):
        take_over(before, after)
    graph.remove(old, safe=True)


def made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Return the standard operator ``op_type`` that makes ``value``, or ``None`` if something else does."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and node.domain in {"", "ai.onnx"} else None


def stored(value: ir.Value | None, rank: int) -> ir.Value | None:
    """Return the float tensor of so many dimensions in the checkpoint that ``value`` is, perhaps cast, or ``None``."""
    cast = made_by(value, "Cast")
    source = cast.inputs[0] if cast is not None else value
    if source is None or not source.is_initializer() or source.is_graph_input() or source.const_value is None:
        return None
    return source if source.const_value.dtype in _FLOATS and len(source.const_value.shape) == rank else None


def operands(node: ir.Node | None) -> tuple[ir.Value, ir.Value] | None:
    """Return the two inputs of a node, or ``None`` if it has not exactly two."""
    if node is None or len(node.inputs) != 2:
        return None
    left, right = node.inputs
    return (left, right) if left is not None and right is not None else None


def two_products(value: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """Return ``x``, ``A`` and ``B`` if ``value`` is ``(x @ A) @ B`` and nothing else is read."""
    second = operands(made_by(value, "MatMul"))
    first = operands(made_by(second[0], "MatMul")) if second is not None else None
    if first is None or second is None or not used_once(value) or not used_once(second[0]):
        return None
    return first[0], first[1], second[1]


def used_once(value: ir.Value) -> bool:
    """Whether exactly one input of one node reads ``value``, and it is no graph output."""
    return not value.is_graph_output() and len(tuple(value.uses())) == 1


def static_dim(value: ir.Value | None, axis: int) -> int | None:
    """Return a static dimension, or ``None`` where it is dynamic or unknown."""
    if value is None or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    dim = value.shape[axis]
    return dim if isinstance(dim, int) else None


def same_shape(*values: ir.Value) -> bool:
    """Whether all shapes are known and equal, dynamic dimensions by name."""
    shapes = [v.shape for v in values]
    if any(s is None or any(str(d) == "None" for d in s) for s in shapes):
        return False
    return len({tuple(map(str, s)) for s in shapes if s is not None}) == 1


def as_axes(array: npt.NDArray[Any] | None, rank: int) -> tuple[int, ...] | None:
    """Return constant axes counted from 0."""
    return None if array is None else tuple(int(a) % rank for a in np.atleast_1d(array))
