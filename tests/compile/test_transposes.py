# SPDX-License-Identifier: BSD-3-Clause
from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from QEfficient.compile.transposes import FuseWeightTranspose

# Seven in each of two layers and the output projection; GPT-2 holds its weights as (in, out), but for a tied output projection.
WEIGHTS = {"llama": 15, "qwen2": 15, "gemma2": 15, "gpt2": 1}


def _count(model, op_type):
    return Counter(node.op_type for node in model.graph)[op_type]


def _transposes(model):
    """Return the transposes of weights."""
    found = [n for n in model.graph if n.op_type == "Transpose" and n.inputs[0].is_initializer()]
    return [n for n in found if next(iter(n.outputs[0].uses())).node.op_type == "MatMul"]


@pytest.mark.parametrize("style", WEIGHTS)
def test_same_bits(exported, trace, tmp_path, style):
    """Every product with a weight takes it as it is stored, adapters' products stay, and no bit changes."""
    made = exported(style)
    before = trace(made.session(made.load(), tmp_path / "before"))
    products = _count(made.load(), "MatMul")
    model, changed = FuseWeightTranspose().apply(made.load())
    assert changed
    assert _count(model, "FusedMatMul") == WEIGHTS[style]
    assert _count(model, "MatMul") == products - WEIGHTS[style]
    for a, b in zip(before, trace(made.session(model, tmp_path / "after")), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not FuseWeightTranspose().apply(model)[1]


def test_weight_of_half_precision(exported, trace, tmp_path):
    """A weight that the graph casts to float32 is taken behind the cast."""
    made = exported("llama")

    def load():
        model, rng = made.load(), np.random.default_rng(0)
        for transpose in _transposes(model):
            weight = transpose.inputs[0]
            numbers = rng.normal(0, 0.1, [int(n) for n in weight.shape]).astype(np.float16)
            half = ir.Value(name=f"{weight.name}_half", const_value=ir.tensor(numbers))
            model.graph.register_initializer(half)
            cast = ir.node("Cast", [half], {"to": ir.DataType.FLOAT})
            cast.outputs[0].shape, cast.outputs[0].dtype = weight.shape, ir.DataType.FLOAT
            model.graph.insert_before(transpose, cast)
            transpose.replace_input_with(0, cast.outputs[0])
        return model

    before = trace(made.session(load(), tmp_path / "before"))
    model, _ = FuseWeightTranspose().apply(load())
    assert _count(model, "FusedMatMul") == WEIGHTS["llama"]
    for a, b in zip(before, trace(made.session(model, tmp_path / "after")), strict=True):
        np.testing.assert_array_equal(a, b)


def _computed(model, transpose):
    weight = transpose.inputs[0]
    twice = ir.node("Add", [weight, weight])
    twice.outputs[0].shape, twice.outputs[0].dtype = weight.shape, weight.dtype
    model.graph.insert_before(transpose, twice)
    transpose.replace_input_with(0, twice.outputs[0])


def _half(model, transpose):
    transpose.inputs[0].dtype = ir.DataType.FLOAT16


def _stack(model, transpose):
    transpose.inputs[0].shape = ir.Shape([1, 64, 64])


@pytest.mark.parametrize("change", [_computed, _half, _stack])
def test_others_are_left_alone(exported, change):
    """A weight that is computed, of other numbers, or no matrix stays transposed by its own node."""
    model = exported("llama").load()
    transpose = _transposes(model)[0]
    change(model, transpose)
    FuseWeightTranspose().apply(model)
    assert [use.node.op_type for use in transpose.outputs[0].uses()] == ["MatMul"]
    assert _count(model, "FusedMatMul") == WEIGHTS["llama"] - 1
