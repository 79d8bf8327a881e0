# SPDX-License-Identifier: BSD-3-Clause
from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from QEfficient.compile.adapters import DropAdapterOutputs, FoldAdapterScaling, FoldAdapterTranspose, lowered_specs
from QEfficient.contract import Manifest

# A scaling multiplied into the tensor rounds once more or less: about 1e-7 of logits near 10, through two layers.
TOLERANCE = 5e-5


def _names(made):
    return [spec.name for spec in Manifest.read(made.graph).adapter]


def _count(model, op_type):
    return Counter(node.op_type for node in model.graph)[op_type]


def _input(model, part):
    return next(v for v in model.graph.inputs if part in v.name)


def _lower(made, model):
    for rewrite in (FoldAdapterTranspose(_names(made)), FoldAdapterScaling(_names(made))):
        model, _ = rewrite.apply(model)
    return model


@pytest.fixture
def llama(exported):
    """Return the tiny Llama and its graph without adapter outputs."""
    made = exported("llama")
    return made, DropAdapterOutputs().apply(made.load())[0]


def test_adapter_outputs_are_dropped(exported, trace, tmp_path):
    """The cache's outputs stay, the adapter's go with their nodes, and the logits are the same bits."""
    made = exported("llama")
    before = made.load()
    states = [s.name + "_RetainedState" for s in Manifest.read(made.graph).states]
    identities = _count(before, "Identity")
    expected = trace(made.session(before, tmp_path / "before"))
    model, changed = DropAdapterOutputs().apply(made.load())
    assert changed
    assert [v.name for v in model.graph.outputs] == ["logits", *states]
    assert _count(model, "Identity") == identities - len(_names(made))
    for a, b in zip(expected, trace(made.session(model, tmp_path / "after")), strict=True):
        np.testing.assert_array_equal(a, b)
    assert DropAdapterOutputs().apply(model)[1] is False


def test_an_output_that_is_computed_stays(exported):
    """An output with an adapter's name that is not its ``Identity`` stays."""
    model = exported("llama").load()
    out = next(v for v in model.graph.outputs if "lora_A" in v.name)
    node = ir.node("Neg", [out.producer().inputs[0]])
    model.graph.append(node)
    name = out.name
    model.graph.outputs[model.graph.outputs.index(out)] = node.outputs[0]
    out.name, node.outputs[0].name = "old", name
    DropAdapterOutputs().apply(model)
    assert name in [v.name for v in model.graph.outputs]


def test_transposes_and_scalings_are_folded(llama, trace, tmp_path):
    """No transpose and no scaling of an adapter is left per step, the manifest says what loading does, logits agree."""
    made, model = llama
    expected = trace(made.session(made.load(), tmp_path / "before"))
    transposes = _count(model, "Transpose")
    model = _lower(made, model)
    tensors = [n for n in _names(made) if "lora_" in n]
    assert _count(model, "Transpose") == transposes - len(tensors)
    specs = {s.name: s for s in lowered_specs(model, Manifest.read(made.graph).adapter)}
    for name in tensors:
        assert specs[name].perm == (1, 0)
        module = name.rsplit(".", 2)[0]
        assert specs[name].scaled_by == (f"{module}.scaling" if "lora_B" in name else "")
        assert not specs[f"{module}.scaling"].bound
    assert not [v.name for v in model.graph.inputs if v.name.endswith(".scaling")]
    for a, b in zip(expected, trace(made.session(model, tmp_path / "after")), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("style", ["gpt2", "softcapped"])
def test_other_styles_agree(exported, trace, tmp_path, style):
    """Whatever of an adapter is folded in other models, the logits agree."""
    made = exported(style)
    expected = trace(made.session(made.load(), tmp_path / "before"))
    model = _lower(made, DropAdapterOutputs().apply(made.load())[0])
    for a, b in zip(expected, trace(made.session(model, tmp_path / "after")), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)


def test_a_tensor_used_in_two_ways_is_not_transposed(llama):
    """A tensor that is also used as it is stays as it is."""
    made, model = llama
    tensor = _input(model, "layers.0.self_attn.q_proj.lora_A")
    node = ir.node("Neg", [tensor])
    model.graph.append(node)
    node.outputs[0].name = "other_use"
    model.graph.outputs.append(node.outputs[0])
    FoldAdapterTranspose(_names(made)).apply(model)
    specs = {s.name: s for s in lowered_specs(model, Manifest.read(made.graph).adapter)}
    assert specs[tensor.name].perm == ()
    assert {s.perm for n, s in specs.items() if "lora_A" in n and n != tensor.name} == {(1, 0)}


def test_a_scaling_used_in_two_ways_is_not_folded(llama):
    """A scaling that something else reads stays an input, and its tensor unscaled."""
    made, model = llama
    model, _ = FoldAdapterTranspose(_names(made)).apply(model)
    scaling = _input(model, "layers.0.self_attn.q_proj.scaling")
    node = ir.node("Neg", [scaling])
    model.graph.append(node)
    node.outputs[0].name = "other_use"
    model.graph.outputs.append(node.outputs[0])
    FoldAdapterScaling(_names(made)).apply(model)
    kept = [v.name for v in model.graph.inputs if v.name.endswith(".scaling")]
    assert kept == [scaling.name]
    specs = {s.name: s for s in lowered_specs(model, Manifest.read(made.graph).adapter)}
    assert specs[scaling.name].bound
    assert specs[scaling.name.replace("scaling", "lora_B.weight")].scaled_by == ""


def test_inputs_that_are_no_adapter_are_left_alone(llama):
    """Only the manifest's adapter tensors are laid out anew."""
    _, model = llama
    for rewrite in (FoldAdapterTranspose([]), FoldAdapterScaling([])):
        assert rewrite.apply(model)[1] is False
