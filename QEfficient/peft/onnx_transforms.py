# SPDX-License-Identifier: BSD-3-Clause
"""Passes over ONNX graphs that hold an adapter's weights as constants."""

from typing import Any

import onnx
from onnx import helper

from QEfficient.contract import RETAINED


class AdapterWeightsToInputsTransform:
    """Turn the weights of one adapter from constants into inputs that a runtime can keep and replace.

    1. Every initializer ``X.<adapter>.weight`` becomes an input ``X.weight`` of the same type and shape.
    2. Every node that reads it, in whatever place, reads the input instead.
    3. An output ``X.weight_RetainedState`` is added, an ``Identity`` of the input.
    4. Inputs, outputs and nodes are appended in the initializers' order; all else stays as it is.

    Graphs that :mod:`QEfficient.export` makes have adapter inputs from the start; this pass is for graphs that other
    exporters made.
    """

    @classmethod
    def apply(cls, model: onnx.ModelProto, *, adapter_name: str, **_: Any) -> tuple[onnx.ModelProto, bool]:
        """Rewrite ``model`` in place.

        Args:
            model: Graph with the adapter's weights as initializers; their values may be external data.
            adapter_name: The adapter whose weights become inputs.
            **_: Options of other passes, ignored.

        Returns:
            The model, and whether anything changed.
        """
        suffix = f".{adapter_name}.weight"
        found = [i for i in model.graph.initializer if i.name.endswith(suffix)]
        names = {i.name: i.name.removesuffix(suffix) + ".weight" for i in found}
        for node in model.graph.node:
            for position, name in enumerate(node.input):
                node.input[position] = names.get(name, name)
        for initializer in found:
            name = names[initializer.name]
            model.graph.input.append(helper.make_tensor_value_info(name, initializer.data_type, list(initializer.dims)))
            output = helper.make_tensor_value_info(name + RETAINED, initializer.data_type, list(initializer.dims))
            model.graph.output.append(output)
            model.graph.node.append(helper.make_node("Identity", [name], [name + RETAINED], name=f"{name}_identity"))
            model.graph.initializer.remove(initializer)
        return model, bool(found)
