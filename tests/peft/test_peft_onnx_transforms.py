# SPDX-License-Identifier: BSD-3-Clause
"""Adapter weights that are constants of a graph become inputs."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from QEfficient.peft.onnx_transforms import AdapterWeightsToInputsTransform

WEIGHTS = ["layer1.weight", "layer2.adapter_0.weight", "layer3.adapter_0.weight"]

WANTED = """<
   ir_version: 8,
   opset_import: ["" : 17]
>
test_adapter_weights (float[n,32] input, float[32,32] "layer2.weight", float[32,32] "layer3.weight") => \
(float[n,32] output, float[32,32] "layer2.weight_RetainedState", float[32,32] "layer3.weight_RetainedState") 
   <float[32,32] "layer1.weight" = ["location": "layer1.weight.data"]>
{
   a = MatMul (input, "layer1.weight")
   b = MatMul (a, "layer2.weight")
   output = MatMul (b, "layer3.weight")
   ["layer2.weight_identity"] "layer2.weight_RetainedState" = Identity ("layer2.weight")
   ["layer3.weight_identity"] "layer3.weight_RetainedState" = Identity ("layer3.weight")
}"""


def three_layers() -> onnx.ModelProto:
    """Return three products, with weights that are external data."""
    chain = ["input", "a", "b", "output"]
    nodes = [helper.make_node("MatMul", [chain[i], w], [chain[i + 1]]) for i, w in enumerate(WEIGHTS)]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 32]) for n in ("input", "output")]
    weights = []
    for name in WEIGHTS:
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[32, 32], data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=f"{name}.data")
        weights.append(tensor)
    graph = helper.make_graph(nodes, "test_adapter_weights", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_weights_of_the_adapter_become_inputs_and_outputs() -> None:
    """The rewritten graph equals the wanted one to the letter, external initializers included."""
    model, changed = AdapterWeightsToInputsTransform.apply(three_layers(), adapter_name="adapter_0")
    assert changed
    assert onnx.printer.to_text(model) == WANTED


def test_other_adapters_are_left_alone() -> None:
    """Without a weight of that adapter, nothing changes and the pass says so."""
    model = three_layers()
    before = onnx.printer.to_text(model)
    model, changed = AdapterWeightsToInputsTransform.apply(model, adapter_name="adapter_1")
    assert not changed
    assert onnx.printer.to_text(model) == before


def test_every_reader_of_a_weight_is_rewired() -> None:
    """A weight that two nodes read leaves no node behind that reads the removed initializer."""
    weight = numpy_helper.from_array(np.eye(3, dtype=np.float32), "w.a.weight")
    nodes = [
        helper.make_node("MatMul", ["x", "w.a.weight"], ["y"]),
        helper.make_node("Add", ["y", "w.a.weight"], ["z"]),
    ]
    x, z = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [3, 3]) for n in "xz")
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [z], [weight]))
    model, _ = AdapterWeightsToInputsTransform.apply(model, adapter_name="a")
    onnx.checker.check_model(model, full_check=True)
    assert [list(n.input) for n in model.graph.node[:2]] == [["x", "w.weight"], ["y", "w.weight"]]


def test_adapter_name_is_required() -> None:
    """Forgetting which adapter is meant is an error."""
    with pytest.raises(TypeError, match="adapter_name"):
        AdapterWeightsToInputsTransform.apply(three_layers())  # type: ignore[call-arg]
