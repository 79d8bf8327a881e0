# SPDX-License-Identifier: BSD-3-Clause
from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from QEfficient.compile.norms import NORM, OWN_NORM, SKIP_NORM, FuseRmsNorm, FuseSkipNorm, OwnNorms
from QEfficient.kernels.check import EPSILON, norms, session

# A kernel adds squares in another order than the chain: about 1e-6 of logits near 10, through two layers.
TOLERANCE = 5e-5
# Norms of two layers and the last one. Gemma's are four to a layer, and half of them have no sum before them; Qwen3 has two on heads.
NORMS = {"llama": 5, "qwen2": 5, "qwen3": 9, "gemma2": 9, "phi3": 5, "gpt2": 0}
# Gemma norms what a block returns, too: here that is the sum of the base's and the adapter's output.
SUMS = {"llama": 4, "qwen2": 4, "qwen3": 4, "gemma2": 6, "phi3": 4, "gpt2": 0}


def _operators(model):
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("style", NORMS)
def test_same_logits(exported, trace, tmp_path, style):
    """Every norm of every style becomes one kernel, those behind a residual sum one with it, and the logits agree."""
    made = exported(style)
    before = trace(made.session(made.load(), tmp_path / "before"))
    model, changed = FuseRmsNorm().apply(made.load())
    assert changed == bool(NORMS[style])
    assert _operators(model)[NORM] == NORMS[style]
    model, changed = FuseSkipNorm().apply(model)
    assert changed == bool(SUMS[style])
    assert _operators(model)[SKIP_NORM] == SUMS[style]
    assert _operators(model)[NORM] == NORMS[style] - SUMS[style]
    assert "ReduceMean" not in _operators(model)
    for a, b in zip(before, trace(made.session(model, tmp_path / "after")), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)


def test_second_time_nothing_changes(exported):
    """Applied again, the passes find nothing."""
    model = exported("llama").load()
    for rewrite in (FuseRmsNorm(), FuseSkipNorm()):
        assert rewrite.apply(model)[1]
        assert not rewrite.apply(model)[1]


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("style", [style for style in SUMS if SUMS[style]])
def test_own_norms(exported, trace, tmp_path, style):
    """Every norm with a sum becomes an operator of ours, and the logits agree."""
    made = exported(style)
    model = made.load()
    for rewrite in (FuseRmsNorm(), FuseSkipNorm()):
        model, _ = rewrite.apply(model)
    before = trace(made.session(model, tmp_path / "before"))
    model, changed = OwnNorms().apply(model)
    assert changed
    assert (_operators(model)[OWN_NORM], _operators(model)[SKIP_NORM]) == (SUMS[style], 0)
    assert OwnNorms().apply(model)[1] is False
    for a, b in zip(before, trace(made.session(model, tmp_path / "after")), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)


def test_a_norm_with_a_bias_is_left_alone(exported):
    """ONNX Runtime's kernel can add a bias, ours cannot."""
    model, _ = FuseSkipNorm().apply(FuseRmsNorm().apply(exported("llama").load())[0])
    for node in [n for n in model.graph if n.op_type == SKIP_NORM]:
        node.resize_inputs(4)
        node.replace_input_with(3, node.inputs[2])
    assert not OwnNorms().apply(model)[1]


def test_operator_refuses_other_shapes(library):
    """Sums that do not fit, and weights of another length, are errors; of no rows there are none."""
    run = session(norms(), library)
    whole, other = np.ones((2, 3), np.float32), np.ones((3, 2), np.float32)
    for feeds in ((whole, other, whole[0]), (whole, whole, other[0])):
        with pytest.raises(Exception, match="not of one shape, or the weight"):
            run.run(None, dict(zip(("a", "b", "weight"), feeds, strict=True)))
    y, total = run.run(None, {"a": whole[:0], "b": whole[:0], "weight": whole[0]})
    assert y.shape == total.shape == (0, 3)


def test_what_is_no_number_stays_in_its_row(library):
    """A row with NaN or infinity gives NaN, the one beside it does not."""
    a = np.ones((3, 20), np.float32)
    a[0, 3], a[2, 19] = np.nan, np.inf
    y, _ = session(norms(), library).run(None, {"a": a, "b": a, "weight": a[1]})
    assert np.isnan(y[0]).all()
    assert np.isnan(y[2, 19])
    np.testing.assert_allclose(y[1], 2 / np.sqrt(4 + EPSILON), rtol=1e-6)


def _other_power(model):
    for node in model.graph:
        if node.op_type == "Pow":
            three = ir.Value(name=f"{node.outputs[0].name}_three", const_value=ir.tensor(np.float32(3)))
            model.graph.register_initializer(three)
            node.replace_input_with(1, three)


def _other_axis(model):
    for node in model.graph:
        if node.op_type == "ReduceMean":
            axis = ir.Value(name=f"{node.outputs[0].name}_axis", const_value=ir.tensor(np.array([1])))
            model.graph.register_initializer(axis)
            node.replace_input_with(1, axis)


def _not_kept(model):
    for node in model.graph:
        if node.op_type == "ReduceMean":
            node.attributes["keepdims"] = ir.AttrInt64("keepdims", 0)


@pytest.mark.parametrize("change", [_other_power, _other_axis, _not_kept])
def test_left_alone(exported, change):
    """A chain that is not exactly the norm over the last axis stays as it is."""
    model = exported("llama").load()
    change(model)
    before = _operators(model)
    model, changed = FuseRmsNorm().apply(model)
    assert not changed
    assert _operators(model) == before


def test_a_broadcast_sum_is_left_alone(exported):
    """A norm behind a sum with a vector, a bias, keeps the sum."""
    model, _ = FuseRmsNorm().apply(exported("llama").load())
    for node in [n for n in model.graph if n.op_type == NORM]:
        bias = ir.Value(name=f"{node.outputs[0].name}_bias", const_value=ir.tensor(np.ones(64, np.float32)))
        bias.shape = ir.Shape([64])
        model.graph.register_initializer(bias)
        add = ir.node("Add", [node.inputs[0], bias])
        add.outputs[0].shape, add.outputs[0].type = node.inputs[0].shape, node.inputs[0].type
        model.graph.insert_before(node, add)
        node.replace_input_with(0, add.outputs[0])
    assert not FuseSkipNorm().apply(model)[1]
