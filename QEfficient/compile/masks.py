# SPDX-License-Identifier: BSD-3-Clause
"""Reading a mask: which tokens does it let attend to which?

A traced mask is a conjunction of comparisons between positions of keys, ``Range(0, C)`` along the last axis, and positions of
queries, ``position_ids`` along the axis before. Two kinds are understood; everything else is ``None``.
"""

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from QEfficient.contract import POSITION_IDS

UNLIMITED = -1
"""The window of plain causal attention."""

_SAME_ELEMENTS = frozenset({"Unsqueeze", "Slice", "Expand", "Identity", "Cast"})
_END = np.iinfo(np.int64).max


def causal_window(mask: ir.Value) -> int | None:
    """Return how many tokens, itself included, each token attends to under a boolean ``mask`` ``(B, 1, S, C)``.

    1. ``key <= query`` gives :data:`UNLIMITED`.
    2. ``key <= query and key > query - w`` gives ``w``.
    """
    causal, window = False, UNLIMITED
    for term in _terms(mask):
        constant = _constant(term)
        if constant is not None and constant.dtype == np.bool_ and constant.all():
            continue
        node = term.producer()
        if node is None or len(node.inputs) != 2:
            return None
        left, right = node.inputs
        if node.op_type == "LessOrEqual" and _is_key(left) and _is_query(right):
            causal = True
        elif node.op_type == "Greater" and _is_key(left) and (size := _distance(right)) is not None and size > 0:
            window = size if window == UNLIMITED else min(window, size)
        else:
            return None
    return window if causal else None


def _terms(mask: ir.Value) -> list[ir.Value]:
    """Return the operands of a tree of ``And``."""
    node = mask.producer()
    if node is not None and node.op_type == "And":
        return [term for value in node.inputs if value is not None for term in _terms(value)]
    if node is not None and node.op_type in {"Expand", "Identity"} and node.inputs[0] is not None:
        return _terms(node.inputs[0])
    return [mask]


def _is_key(value: ir.Value | None) -> bool:
    """Whether ``value`` is 0, 1, …, C - 1 along the last of four axes."""
    if not _lies_along(value, 3):
        return False
    node = _source(value).producer()
    if node is None or node.op_type != "Range":
        return False
    # How far it counts needs no look: the mask is as wide as the cache, or ``Attention`` would not take it.
    return _is_scalar(node.inputs[0], 0) and _is_scalar(node.inputs[2], 1)


def _is_query(value: ir.Value | None) -> bool:
    """Whether ``value`` is ``position_ids`` along the third of four axes."""
    if not _lies_along(value, 2):
        return False
    source = _source(value)
    return source.is_graph_input() and source.name == POSITION_IDS


def _distance(value: ir.Value | None) -> int | None:
    """Return ``w`` of ``query - w``."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Sub" or not _is_query(node.inputs[0]):
        return None
    constant = _constant(node.inputs[1])
    return int(constant.reshape(())) if constant is not None and constant.size == 1 else None


def _lies_along(value: ir.Value | None, axis: int) -> bool:
    """Whether a four-dimensional value has more than one element along ``axis`` (and the batch) only."""
    if value is None or value.shape is None or len(value.shape) != 4:
        return False
    return all(i == axis or dim == 1 or (axis == 2 and i == 0) for i, dim in enumerate(value.shape))


def _source(value: ir.Value | None) -> ir.Value:
    """Follow ``value`` up through operators that keep its elements in order."""
    if value is None:
        raise ValueError("an operand is missing")
    node = value.producer()
    while node is not None and node.op_type in _SAME_ELEMENTS and node.inputs[0] is not None:
        if node.op_type == "Slice" and not _keeps_all(node):
            break
        value = node.inputs[0]
        node = value.producer()
    return value


def _keeps_all(node: ir.Node) -> bool:
    starts, ends = _constant(node.inputs[1]), _constant(node.inputs[2])
    steps = _constant(node.inputs[4]) if len(node.inputs) > 4 else np.array([1])
    if starts is None or ends is None or steps is None:
        return False
    return bool((starts == 0).all() and (ends == _END).all() and (steps == 1).all())


def _is_scalar(value: ir.Value | None, number: int) -> bool:
    constant = _constant(value)
    return constant is not None and constant.size == 1 and int(constant.reshape(())) == number


def _constant(value: ir.Value | None) -> npt.NDArray[np.generic] | None:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return tensor.numpy() if tensor is not None else None
