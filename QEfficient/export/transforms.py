# SPDX-License-Identifier: BSD-3-Clause
"""Passes over a traced graph. Each is a class with ``apply(model) -> changed``; ``PASSES`` is their order."""

from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

from QEfficient.contract import RETAINED


class Pass(Protocol):
    """One rewrite of a graph, in place."""

    def apply(self, model: ir.Model) -> bool:
        """Rewrite ``model``; return whether anything changed."""
        ...


class FoldConstants:
    """Compute what depends on constants only (small ones), merge equal computations, drop what nothing reads."""

    def apply(self, model: ir.Model) -> bool:  # noqa: D102
        before = model.graph.num_nodes()
        optimizer.fold_constants(model, onnx_shape_inference=False)
        common.CommonSubexpressionEliminationPass()(model)
        common.RemoveUnusedNodesPass()(model)
        return model.graph.num_nodes() != before


class StaticReshape:
    """Give reshapes constant targets: ``[0, 0, 14, 64]`` instead of one that is put together from the input's shape.

    1. A dimension with a number becomes that number; one that the input has in the same place becomes 0 (copied).
    2. One other dimension may become -1 (inferred); with a second one the node stays as it is.
    """

    def apply(self, model: ir.Model) -> bool:  # noqa: D102
        changed = False
        for node in model.graph:
            target = _reshape_target(node) if node.op_type == "Reshape" and node.domain == "" else None
            if target is not None and node.inputs[1] is not None and node.inputs[1].const_value is None:
                node.replace_input_with(1, _constant(model, np.array(target, np.int64)))
                node.attributes.pop("allowzero", None)
                changed = True
        if changed:
            common.RemoveUnusedNodesPass()(model)
        return changed


class NameNodes:
    """Name every node after the module that it came from: ``model.layers.0.mlp.up_proj/MatMul``."""

    def apply(self, model: ir.Model) -> bool:  # noqa: D102
        taken: dict[str, int] = {}
        for node in model.graph:
            scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
            module = _innermost_module(scopes)
            name = f"{module}/{node.op_type}" if module else node.op_type
            count = taken.get(name, 0)
            taken[name] = count + 1
            node.name = f"{name}_{count}" if count else name
            node.metadata_props.clear()
        return True


class RetainAdapter:
    """Give every adapter input an output ``<name>_RetainedState``, so that a runtime may keep it in place."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def apply(self, model: ir.Model) -> bool:  # noqa: D102
        inputs = {v.name: v for v in model.graph.inputs}
        for name in self.names:
            value = inputs[name]
            node = ir.node("Identity", [value], name=f"{name}_identity")
            output = node.outputs[0]
            output.name, output.shape, output.type = name + RETAINED, value.shape, value.type
            model.graph.append(node)
            model.graph.outputs.append(output)
        return bool(self.names)


def _reshape_target(node: ir.Node) -> list[int] | None:
    source, made = node.inputs[0], node.outputs[0]
    if source is None or source.shape is None or made.shape is None or 0 in made.shape:
        return None
    target = []
    for axis, size in enumerate(made.shape):
        named = isinstance(size, ir.SymbolicDim) and size.value is not None
        same = named and axis < len(source.shape) and source.shape[axis] == size
        target.append(size if isinstance(size, int) else 0 if same else -1)
    return None if target.count(-1) > 1 else target


def _constant(model: ir.Model, array: npt.NDArray[np.int64]) -> ir.Value:
    name = "shape_" + "_".join(map(str, array.tolist()))
    if name not in model.graph.initializers:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape([len(array)]), type=ir.TensorType(tensor.dtype), const_value=tensor)
        model.graph.initializers.add(value)
    return model.graph.initializers[name]


def _innermost_module(scopes: str) -> str:
    """Return ``model.layers.0.mlp`` from the tracer's list of scopes, whose last entry is the traced node."""
    parts = [p.strip(" '\"") for p in scopes.strip("[]").split(",")]
    return next((p.removeprefix("inner.") for p in reversed(parts[:-1]) if p.startswith("inner.")), "")
