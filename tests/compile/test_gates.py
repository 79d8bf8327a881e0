# SPDX-License-Identifier: BSD-3-Clause
from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from QEfficient.compile.gates import OPERATOR, OwnGates
from QEfficient.kernels.check import gates, session

# Sigmoids that differ in the last places of float32: seen 2e-6 of logits near 10, through two layers.
TOLERANCE = 5e-5
GATES = {"llama": 2, "qwen2": 2, "phi3": 2, "gemma2": 0, "gpt2": 0}


def _operators(model):
    return Counter(node.op_type for node in model.graph)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("style", GATES)
def test_same_logits(exported, trace, tmp_path, style):
    """Every gate by SiLU becomes one operator, others stay, and the logits agree."""
    made = exported(style)
    before = trace(made.session(made.load(), tmp_path / "before"))
    model, changed = OwnGates().apply(made.load())
    assert changed == bool(GATES[style])
    assert _operators(model)[OPERATOR] == GATES[style]
    assert _operators(model)["Sigmoid"] == 0
    assert OwnGates().apply(model)[1] is False
    for a, b in zip(before, trace(made.session(model, tmp_path / "after")), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)


def test_sigmoid_of_another_value(exported):
    """``x * Sigmoid(z) * y`` is left alone."""
    model = exported("llama").load()
    for node in model.graph:
        if node.op_type == "Sigmoid":
            negative = ir.node("Neg", [node.inputs[0]])
            model.graph.insert_before(node, negative)
            node.replace_input_with(0, negative.outputs[0])
    assert OwnGates().apply(model)[1] is False


def test_other_shapes(exported):
    """What is broadcast is left alone."""
    model = exported("llama").load()
    for node in model.graph:
        if node.op_type == "Sigmoid":
            node.inputs[0].shape = ir.Shape([1, 1, 1])
    assert OwnGates().apply(model)[1] is False


def test_operator_refuses_other_shapes(library):
    """A gate that does not fit is an error; one of nothing gives nothing."""
    run = session(gates(), library)
    feeds = {"gate": np.zeros((2, 3), np.float32), "up": np.zeros((3, 2), np.float32)}
    with pytest.raises(Exception, match="not of one shape"):
        run.run(None, feeds)
    assert run.run(None, {name: np.zeros((0, 3), np.float32) for name in feeds})[0].shape == (0, 3)


def test_values_of_any_size(library):
    """Large numbers saturate as they do in float32; what is no number stays so."""
    gate = np.array([-1e4, -60, -1, -0.0, 1e-30, 1, 60, 1e4, np.nan, 2], np.float32)
    up = np.array([2, 2, 2, 2, 2, 2, 2, 2, 2, np.nan], np.float32)
    got = session(gates(), library).run(None, {"gate": gate, "up": up})[0]
    wide = gate.astype(np.float64)
    with np.errstate(over="ignore"):
        wanted = wide / (1 + np.exp(-wide)) * up
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-30)
