# SPDX-License-Identifier: BSD-3-Clause
"""Attention over the cache as one kernel.

The portable graph writes keys and values with ``TensorScatter`` and attends with ``Attention``, which computes over the
whole cache. ``GroupQueryAttention`` of ONNX Runtime does both in one kernel, and reads only what is filled. An operator of our own
(:mod:`QEfficient.kernels`) does the same for single tokens in less time, and leaves calls of several tokens to that kernel.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from QEfficient.compile.masks import UNLIMITED, causal_window
from QEfficient.compile.values import CONTRIB, new_constant, replace_node, take_over
from QEfficient.kernels.library import DOMAIN

KERNEL = "GroupQueryAttention"
OPERATOR = "CacheAttention"
_HEADS_LAST = (0, 2, 1, 3)


class FuseCacheAttention:
    """``TensorScatter``, ``TensorScatter``, ``Attention`` become one ``GroupQueryAttention``.

    1. Only causal attention is replaced, plain or in a sliding window, with ``nonpad_kv_seqlen = write_indices + S``.
    2. Only caches that are graph inputs, and whose new state nothing reads but this attention and a graph output.
    3. Only known, equal head sizes of keys and values.

    The kernel's length of row ``b``, ``seqlens_k[b] + 1``, is ``start + S`` with padding included: padding at the end of a chunk
    counts as tokens, which no real token attends to. With several rows the kernel takes several tokens at a time only
    at the start of the rows: a session has to split other calls into rows (``contract.ONE_ROW_CHUNKS``).
    """

    def apply(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Replace every match in ``model``; return it, and whether there was one."""
        graph = model.graph
        lengths: dict[str, tuple[ir.Value, ir.Value]] = {}
        changed = False
        for node in list(graph):
            match = _match(node)
            if match is None:
                continue
            nonpad = node.inputs[6]
            if nonpad is None or nonpad.name is None:
                continue
            if nonpad.name not in lengths:
                lengths[nonpad.name] = _kernel_lengths(graph, nonpad)
            _replace(graph, node, *match, *lengths[nonpad.name])
            changed = True
        if changed:
            model.opset_imports.setdefault(CONTRIB, 1)
            common.RemoveUnusedNodesPass()(model)  # masks that nothing reads any more
        return model, changed


class OwnAttention:
    """``GroupQueryAttention`` becomes ``CacheAttention``: caches of 32-bit floats, scores that are not capped."""

    def apply(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Replace every match in ``model``; return it, and whether there was one."""
        changed = False
        for node in list(model.graph):
            if node.op_type != KERNEL or node.domain != CONTRIB:
                continue
            softcap = node.attributes.get("softcap")
            if (softcap is not None and softcap.as_float()) or any(
                _dtype(v) != ir.DataType.FLOAT for v in node.inputs[3:5]
            ):
                continue
            attributes = {
                "num_heads": _int(node, "num_heads", 0),
                "kv_num_heads": _int(node, "kv_num_heads", 0),
                "scale": node.attributes["scale"].as_float(),
                "local_window_size": _int(node, "local_window_size", UNLIMITED),
                "do_rotary": _int(node, "do_rotary", 0),
            }
            own = ir.node(OPERATOR, list(node.inputs), attributes, domain=DOMAIN, num_outputs=3)
            replace_node(model.graph, node, own)
            changed = True
        if changed:
            model.opset_imports.setdefault(DOMAIN, 1)
        return model, changed


def attends(model: ir.Model) -> bool:
    """Whether a kernel of this module is in ``model``."""
    return any((n.domain, n.op_type) in {(CONTRIB, KERNEL), (DOMAIN, OPERATOR)} for n in model.graph)


def _dtype(value: ir.Value | None) -> ir.DataType | None:
    return None if value is None else value.dtype


def _match(node: ir.Node) -> tuple[ir.Node, ir.Node, int] | None:
    """Return the two ``TensorScatter`` nodes before a causal ``Attention`` over the cache, and its window, or ``None``."""
    if node.op_type != "Attention" or node.domain not in {"", "ai.onnx"} or len(node.inputs) < 7:
        return None
    query, key, value, mask, past_key, past_value, nonpad = node.inputs[:7]
    if query is None or key is None or value is None or nonpad is None:
        return None
    if past_key is not None or past_value is not None or len(node.outputs) != 1:
        return None
    if mask is None:
        window = UNLIMITED if _int(node, "is_causal", 0) == 1 else None
    else:
        window = causal_window(mask)
    if window is None:
        return None
    scatters = key.producer(), value.producer()
    if not all(s is not None and _writes_cache(s, node) for s in scatters):
        return None
    write_key, write_value = scatters
    if write_key is None or write_value is None or write_key.inputs[2] is not write_value.inputs[2]:
        return None
    if not _is_start_plus_length(nonpad, write_key.inputs[2]):
        return None
    key_size, value_size = _dim(write_key.inputs[0], 3), _dim(write_value.inputs[0], 3)
    if key_size is None or key_size != value_size or None in (_dim(query, 1), _dim(write_key.inputs[0], 1)):
        return None
    return write_key, write_value, window


def _writes_cache(scatter: ir.Node, attention: ir.Node) -> bool:
    if scatter.op_type != "TensorScatter" or len(scatter.inputs) < 3 or None in scatter.inputs[:3]:
        return False
    mode = scatter.attributes.get("mode")
    if _int(scatter, "axis", -2) not in {2, -2} or (mode is not None and mode.as_string() != "linear"):
        return False
    past = scatter.inputs[0]
    if past is None or not past.is_graph_input():
        return False
    if any(use.node is not scatter and use.node.op_type != "Shape" for use in past.uses()):
        return False
    return all(use.node is attention for use in scatter.outputs[0].uses())


def _is_start_plus_length(nonpad: ir.Value, start: ir.Value | None) -> bool:
    """Whether ``nonpad`` is ``start`` plus the number of this call's tokens: a dimension of some input."""
    add = nonpad.producer()
    if add is None or add.op_type != "Add" or start is None or not any(i is start for i in add.inputs):
        return False
    other = next((i for i in add.inputs if i is not None and i is not start), None)
    node = other.producer() if other is not None else None
    while node is not None and node.op_type in {
        "Squeeze",
        "Unsqueeze",
        "Cast",
        "Reshape",
        "Gather",
        "Identity",
        "Slice",
    }:
        first = node.inputs[0]
        node = first.producer() if first is not None else None
    return (
        node is not None and node.op_type == "Shape" and node.inputs[0] is not None and node.inputs[0].is_graph_input()
    )


def _kernel_lengths(graph: ir.Graph, nonpad: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return ``seqlens_k`` ``(B,)`` and ``total_sequence_length`` ``()``, both int32, behind the node that makes ``nonpad``."""
    one = new_constant(graph, f"{nonpad.name}_one", np.array([1], np.int64))
    before = ir.node("Sub", [nonpad, one])
    rows = ir.node("Cast", before.outputs, attributes={"to": ir.DataType.INT32})
    longest = ir.node("ReduceMax", [nonpad], attributes={"keepdims": 0})
    total = ir.node("Cast", longest.outputs, attributes={"to": ir.DataType.INT32})
    producer = nonpad.producer()
    if producer is None:
        raise ValueError(f"{nonpad.name} has no producer")
    graph.insert_after(producer, [before, rows, longest, total])
    return rows.outputs[0], total.outputs[0]


def _replace(
    graph: ir.Graph,
    node: ir.Node,
    write_key: ir.Node,
    write_value: ir.Node,
    window: int,
    rows: ir.Value,
    total: ir.Value,
) -> None:
    query = node.inputs[0]
    heads, kv_heads = _dim(query, 1), _dim(write_key.inputs[0], 1)
    size = _dim(write_key.inputs[0], 3)
    if heads is None or kv_heads is None or size is None:
        raise ValueError(f"{node.name}: unknown sizes")
    before = [_heads_last(graph, v) for v in (query, write_key.inputs[1], write_value.inputs[1])]
    scale = node.attributes.get("scale")
    softcap = node.attributes.get("softcap")
    fused = ir.node(
        KERNEL,
        [*(nodes[-1].outputs[0] for nodes in before), write_key.inputs[0], write_value.inputs[0], rows, total],
        attributes={
            "num_heads": heads,
            "kv_num_heads": kv_heads,
            "scale": scale.as_float() if scale is not None else size**-0.5,
            "local_window_size": window,
            "softcap": softcap.as_float() if softcap is not None else 0.0,
        },
        domain=CONTRIB,
        num_outputs=3,
    )
    by_head = new_constant(graph, f"{node.outputs[0].name}_by_head", np.array([0, 0, heads, size], np.int64))
    split = ir.node("Reshape", [fused.outputs[0], by_head])
    heads_first = ir.node("Transpose", split.outputs, attributes={"perm": _HEADS_LAST})
    graph.insert_before(node, [n for nodes in before for n in nodes] + [fused, split, heads_first])
    take_over(node.outputs[0], heads_first.outputs[0])
    take_over(write_key.outputs[0], fused.outputs[1])
    take_over(write_value.outputs[0], fused.outputs[2])
    graph.remove([node, write_key, write_value], safe=True)


def _heads_last(graph: ir.Graph, value: ir.Value | None) -> list[ir.Node]:
    """Return nodes that turn ``(B, H, S, D)`` into ``(B, S, H * D)``."""
    if value is None:
        raise ValueError("attention without a query, key or value")
    flat = new_constant(graph, "qeff_heads_flat", np.array([0, 0, -1], np.int64))
    transpose = ir.node("Transpose", [value], attributes={"perm": _HEADS_LAST})
    return [transpose, ir.node("Reshape", [transpose.outputs[0], flat])]


def _dim(value: ir.Value | None, axis: int) -> int | None:
    """Return a static dimension, or ``None`` where it is dynamic or unknown."""
    if value is None or value.shape is None or len(value.shape) != 4:
        return None
    dim = value.shape[axis]
    return dim if isinstance(dim, int) else None


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()
