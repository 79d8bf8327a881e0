# SPDX-License-Identifier: BSD-3-Clause
from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from QEfficient.compile.attention import FuseCacheAttention, OwnAttention
from QEfficient.compile.masks import UNLIMITED, causal_window
from QEfficient.compile.rotary import RotaryIntoAttention

# One kernel adds in another order than the other; float32 sums of these sizes differ by about 1e-6 of logits near 10.
TOLERANCE = 5e-5


def _operators(model):
    return Counter(node.op_type for node in model.graph)


def _attention(model):
    return next(node for node in model.graph if node.op_type == "Attention")


@pytest.mark.parametrize("style", ["llama", "mistral", "qwen3", "gpt2", "softcapped"])
def test_same_logits(exported, trace, tmp_path, style):
    """Prompts, chunks and single tokens of rows of different lengths give the same logits before and after."""
    made = exported(style)
    before = trace(made.session(made.load(), tmp_path / "before"))
    model, changed = FuseCacheAttention().apply(made.load())
    after = trace(made.session(model, tmp_path / "after"))
    assert changed
    operators = _operators(model)
    assert operators["GroupQueryAttention"] == 2
    assert not {"Attention", "TensorScatter"} & set(operators)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("style", "positions"), [("llama", 64), ("llama", 0), ("mistral", 64), ("qwen3", 64), ("gpt2", 64)]
)
def test_our_operator(exported, trace, tmp_path, style, positions):
    """Single tokens of rows of different lengths, rotated in the kernel or before, give the same logits in our operator."""
    made = exported(style)
    before = trace(made.session(made.load(), tmp_path / "before"))
    model = RotaryIntoAttention(positions).apply(FuseCacheAttention().apply(made.load())[0])[0]
    model, changed = OwnAttention().apply(model)
    after = trace(made.session(model, tmp_path / "after"))
    assert changed
    operators = _operators(model)
    assert operators["CacheAttention"] == 2
    assert operators["GroupQueryAttention"] == 0
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)
    assert OwnAttention().apply(model)[1] is False


def test_capped_scores_are_left_alone(exported):
    """Our operator caps no scores."""
    model, changed = OwnAttention().apply(FuseCacheAttention().apply(exported("softcapped").load())[0])
    assert not changed
    assert _operators(model)["GroupQueryAttention"] == 2


def test_inputs_and_outputs_stay(exported):
    """The fused graph has the inputs and outputs of the graph before, by name and order, and keeps the kernel's settings."""
    before = exported("softcapped").load()
    names = [[v.name for v in values] for values in (before.graph.inputs, before.graph.outputs)]
    model, _ = FuseCacheAttention().apply(before)
    assert [[v.name for v in values] for values in (model.graph.inputs, model.graph.outputs)] == names
    fused = [n for n in model.graph if n.op_type == "GroupQueryAttention"]
    assert [n.attributes["local_window_size"].as_int() for n in fused] == [5, UNLIMITED]
    for node in fused:
        settings = {name: a.value for name, a in node.attributes.items()}
        assert settings["num_heads"] == 4
        assert settings["kv_num_heads"] == 2
        assert settings["softcap"] == pytest.approx(0.5)
        assert settings["scale"] == pytest.approx(256**-0.5)


def test_second_time_nothing_changes(exported):
    """Applied again, the pass finds nothing."""
    model, _ = FuseCacheAttention().apply(exported("llama").load())
    assert FuseCacheAttention().apply(model)[1] is False


def _not_causal(model):
    for node in model.graph:
        if node.op_type == "Attention":
            node.attributes["is_causal"] = ir.AttrInt64("is_causal", 0)


def _keys_read_elsewhere(model):
    for node in list(model.graph):
        if node.op_type == "Attention":
            keys = ir.node("Identity", [node.inputs[1]])
            model.graph.append(keys)
            keys.outputs[0].name = f"{node.inputs[1].name}_copy"
            model.graph.outputs.append(keys.outputs[0])


def _other_length(model):
    for node in model.graph:
        if node.op_type == "Attention":
            node.replace_input_with(6, node.inputs[6].producer().inputs[0])


def _other_axis(model):
    for node in model.graph:
        if node.op_type == "TensorScatter":
            node.attributes["axis"] = ir.AttrInt64("axis", 1)


def _circular(model):
    for node in model.graph:
        if node.op_type == "TensorScatter":
            node.attributes["mode"] = ir.AttrString("mode", "circular")


@pytest.mark.parametrize("change", [_not_causal, _keys_read_elsewhere, _other_length, _other_axis, _circular])
def test_left_alone(exported, change):
    """Attention that is not exactly causal attention over this call's cache stays as it is."""
    model = exported("llama").load()
    change(model)
    before = _operators(model)
    model, changed = FuseCacheAttention().apply(model)
    assert not changed
    assert _operators(model) == before


def test_windows_are_read_from_masks(exported):
    """A sliding window's size is read from the mask that was traced; a mask with anything more is not understood."""
    model = exported("mistral").load()
    mask = _attention(model).inputs[3]
    assert causal_window(mask) == 5
    opposite = ir.node("Not", [mask])
    both = ir.node("And", [mask, opposite.outputs[0]])
    assert causal_window(both.outputs[0]) is None
    window, causal = mask.producer().inputs
    assert causal_window(causal) == UNLIMITED
    assert causal_window(window) is None


def test_a_mask_that_is_not_understood_is_left_alone(exported, trace, tmp_path):
    """A mask with one more condition keeps its ``Attention``, and the logits."""
    made = exported("mistral")
    model = made.load()
    node = _attention(model)
    opposite = ir.node("Not", [ir.node("Not", [node.inputs[3]]).outputs[0]])
    model.graph.insert_before(node, [opposite.inputs[0].producer(), opposite])
    for use in [n for n in model.graph if n.op_type == "Attention"]:
        use.replace_input_with(3, opposite.outputs[0])
    model, changed = FuseCacheAttention().apply(model)
    assert not changed
    assert _operators(model)["Attention"] == 2
