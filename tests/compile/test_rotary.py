# SPDX-License-Identifier: BSD-3-Clause
from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from QEfficient.compile.attention import FuseCacheAttention
from QEfficient.compile.heads import FoldHeadSplits
from QEfficient.compile.rotary import RotaryIntoAttention
from tests.tiny import SHAPE

TOLERANCE = 5e-5  # as for attention
POSITIONS = SHAPE["max_position_embeddings"]


def _attention(model):
    return [n for n in model.graph if n.op_type == "GroupQueryAttention"]


def _fused(made):
    return FuseCacheAttention().apply(made.load())[0]


@pytest.mark.parametrize("style", ["llama", "qwen2", "qwen3", "gemma2", "phi3", "mistral"])
def test_same_logits(exported, trace, tmp_path, style):
    """Rotation by the kernel's tables gives the graph's logits, for ragged rows, chunks and single tokens."""
    made = exported(style)
    before = trace(made.session(made.load(), tmp_path / "before"))
    model, changed = RotaryIntoAttention(POSITIONS).apply(_fused(made))
    assert changed
    assert all(n.attributes["do_rotary"].as_int() == 1 for n in _attention(model))
    tables = {v.name for n in _attention(model) for v in n.inputs[7:9]}
    assert len(tables) == 2  # one pair for all layers
    assert not {"Cos", "Sin", "Neg"} & {n.op_type for n in model.graph}
    for a, b in zip(before, trace(made.session(model, tmp_path / "after")), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)
    model, changed = FoldHeadSplits().apply(RotaryIntoAttention(POSITIONS).apply(_fused(made))[0])
    assert changed
    for a, b in zip(before, trace(made.session(model, tmp_path / "folded")), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("style", ["llama", "gpt2"])
def test_heads_are_not_split_to_be_joined(exported, style):
    """Between projections and the kernel no transpose is left."""
    model, _ = RotaryIntoAttention(POSITIONS).apply(_fused(exported(style)))
    model, _ = FoldHeadSplits().apply(model)
    swaps = [
        n for n in model.graph if n.op_type == "Transpose" and list(n.attributes["perm"].as_ints()) == [0, 2, 1, 3]
    ]
    assert not swaps
    assert not FoldHeadSplits().apply(model)[1]


def test_learned_positions_are_left_alone(exported):
    """A model that does not rotate stays as it is, as does one without a longest context."""
    assert not RotaryIntoAttention(POSITIONS).apply(_fused(exported("gpt2")))[1]
    assert not RotaryIntoAttention(0).apply(_fused(exported("llama")))[1]


def _angles_from_all_positions(model):
    """Frequencies that depend on the longest position, as dynamic scaling has them."""
    cos = next(n for n in model.graph if n.op_type == "Cos")
    longest = ir.node("ReduceMax", [cos.inputs[0]], {"keepdims": 1})
    add = ir.node("Add", [cos.inputs[0], longest.outputs[0]])
    model.graph.insert_before(cos, [longest, add])
    cos.replace_input_with(0, add.outputs[0])


def _other_sine_for_keys(model):
    muls = [n for n in model.graph if n.op_type == "Mul" and any(_is_turned(v) for v in n.inputs)]
    for mul in muls[1::2]:
        other = ir.node("Neg", [mul.inputs[1]])
        model.graph.insert_before(mul, other)
        mul.replace_input_with(1, other.outputs[0])


def _is_turned(value):
    node = value.producer()
    return node is not None and node.op_type == "Concat" and node.inputs[0].producer().op_type == "Neg"


def _turned_the_other_way(model):
    for node in list(model.graph):
        if node.op_type == "Concat" and node.inputs[0].producer() and node.inputs[0].producer().op_type == "Neg":
            left, right = node.inputs
            node.replace_input_with(0, right)
            node.replace_input_with(1, left)


@pytest.mark.parametrize("change", [_angles_from_all_positions, _other_sine_for_keys, _turned_the_other_way])
def test_left_alone(exported, change):
    """Another rotation than the kernel's own stays as it is."""
    model = _fused(exported("llama"))
    change(model)
    before = Counter(n.op_type for n in model.graph)
    model, changed = RotaryIntoAttention(POSITIONS).apply(model)
    assert not changed
    assert Counter(n.op_type for n in model.graph) == before
