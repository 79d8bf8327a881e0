# SPDX-License-Identifier: BSD-3-Clause
"""Passes over a traced graph. Each is a class with ``apply(model) -> changed``; ``PASSES`` is their order."""

from typing import Protocol

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


def _innermost_module(scopes: str) -> str:
    """Return ``model.layers.0.mlp`` from the tracer's list of scopes, whose last entry is the traced node."""
    parts = [p.strip(" '\"") for p in scopes.strip("[]").split(",")]
    return next((p.removeprefix("inner.") for p in reversed(parts[:-1]) if p and p != "inner"), "")
