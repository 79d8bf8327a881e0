# SPDX-License-Identifier: BSD-3-Clause
"""Adapter tensors as the kernels want them.

What the portable graph does with adapter tensors at every step (pass them on, transpose them, multiply by a scaling), a session
can do once, when it loads the adapter. These passes take the work out of the graph, and note it at the input; the notes
become fields of the manifest's ``AdapterSpec``.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from QEfficient.contract import RETAINED, AdapterSpec

_PERM = "QEfficient.perm"
_SCALED_BY = "QEfficient.scaled_by"
_PARTS = "QEfficient.parts"


class DropAdapterOutputs:
    """Adapter tensors are not passed through the graph: their ``_RetainedState`` outputs go, with the ``Identity`` nodes.

    An output is dropped if it is the ``Identity`` of a graph input with the same name, so the cache's outputs stay.
    """

    def apply(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Drop such outputs of ``model``; return it, and whether there were any."""
        graph = model.graph
        passed = [out for out in graph.outputs if _is_passed_through(out)]
        for out in passed:
            node = out.producer()
            graph.outputs.remove(out)
            if node is not None and not any(True for _ in out.uses()):
                graph.remove(node, safe=True)
        return model, bool(passed)


class FoldAdapterTranspose:
    """An adapter tensor that is only ever used transposed comes in transposed.

    Matches a graph input whose every use is a ``Transpose`` with one and the same ``perm``, if that input is one of the
    adapter's.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = frozenset(names)

    def apply(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Fold such transposes of ``model``; return it, and whether there were any."""
        changed = False
        for value in model.graph.inputs:
            if value.name not in self.names or value.is_graph_output() or _PERM in value.metadata_props:
                continue
            nodes = [use.node for use in value.uses()]
            perms = {_perm(node) for node in nodes}
            if len(perms) != 1 or None in perms or any(n.outputs[0].is_graph_output() for n in nodes):
                continue
            perm = next(iter(perms)) or ()
            for node in nodes:
                node.outputs[0].replace_all_uses_with(value)
                model.graph.remove(node, safe=True)
            if value.shape is not None:
                value.shape = ir.Shape([value.shape[i] for i in perm])
            value.metadata_props[_PERM] = ",".join(map(str, perm))
            changed = True
        return model, changed


class FoldAdapterScaling:
    """A scaling that multiplies ``x @ W`` multiplies the adapter tensor ``W`` instead, once, and is no input any more.

    1. ``W`` is used by that ``MatMul`` only, and the product by that ``Mul`` only.
    2. Every use of the scaling is such a ``Mul``.

    Rounding differs by one multiplication: about 1e-7 of the product.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = frozenset(names)

    def apply(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Fold such scalings of ``model``; return it, and whether there were any."""
        changed = False
        for scaling in list(model.graph.inputs):
            if scaling.name not in self.names or scaling.shape is None or len(scaling.shape) != 0:
                continue
            uses = [use.node for use in scaling.uses()]
            weights = [self._weight(mul, scaling) for mul in uses]
            if (
                not uses
                or scaling.is_graph_output()
                or None in weights
                or len({id(w) for w in weights}) != len(weights)
            ):
                continue
            for mul, weight in zip(uses, weights, strict=True):
                product = next(i for i in mul.inputs if i is not scaling)
                if weight is None or product is None:
                    continue
                weight.metadata_props[_SCALED_BY] = str(scaling.name)
                _take_place(model.graph, mul, product)
            model.graph.inputs.remove(scaling)
            changed = True
        return model, changed

    def _weight(self, mul: ir.Node, scaling: ir.Value) -> ir.Value | None:
        """Return the adapter tensor that may be scaled instead of the product, or ``None``."""
        if mul.op_type != "Mul" or mul.domain or sum(i is scaling for i in mul.inputs) != 1:
            return None
        product = next(i for i in mul.inputs if i is not scaling)
        matmul = product.producer() if product is not None else None
        if product is None or matmul is None or matmul.op_type != "MatMul" or product.is_graph_output():
            return None
        weight = matmul.inputs[1]
        if weight is None or weight.name not in self.names or not weight.is_graph_input():
            return None
        alone = len(list(product.uses())) == 1 and len(list(weight.uses())) == 1
        return weight if alone and _SCALED_BY not in weight.metadata_props else None


def note_parts(value: ir.Value, parts: Sequence[tuple[ir.Value, tuple[int, ...]]]) -> None:
    """Note that the input ``value`` is made of other adapter inputs.

    Args:
        value: The joined input.
        parts: Each part with its place, as ``AdapterSpec.columns`` has it.
    """
    noted = [
        [part.name, part.metadata_props.get(_PERM, ""), part.metadata_props.get(_SCALED_BY, ""), columns]
        for part, columns in parts
    ]
    value.metadata_props[_PARTS] = json.dumps(noted)


def part_starts(value: ir.Value) -> tuple[int, ...]:
    """Return the first column of each part of the joined ``B`` that ``value`` is; nothing if it is none."""
    return tuple(columns[0] for *_, columns in json.loads(value.metadata_props.get(_PARTS, "[]")))


def drop_unused_parts(model: ir.Model) -> None:
    """Remove adapter inputs that are parts of others now."""
    parts = {part[0] for value in model.graph.inputs for part in json.loads(value.metadata_props.get(_PARTS, "[]"))}
    for value in [v for v in model.graph.inputs if v.name in parts]:
        model.graph.inputs.remove(value)


def lowered_specs(model: ir.Model, specs: Sequence[AdapterSpec]) -> tuple[AdapterSpec, ...]:
    """Return ``specs`` with what the passes noted at the inputs of ``model``."""
    notes: dict[str, dict[str, Any]] = {}
    for value in model.graph.inputs:
        props, held = value.metadata_props, "int8" if value.dtype == ir.DataType.INT8 else ""
        notes[str(value.name)] = _note(props.get(_PERM, ""), props.get(_SCALED_BY, ""), held)
        for name, perm, scaled_by, columns in json.loads(props.get(_PARTS, "[]")):
            notes[name] = {**_note(perm, scaled_by, held), "joined": str(value.name), "columns": tuple(columns)}
    return tuple(replace(spec, **notes.get(spec.name, {"bound": False})) for spec in specs)


def _note(perm: str, scaled_by: str, held: str) -> dict[str, Any]:
    return {"perm": tuple(int(i) for i in perm.split(",") if i), "scaled_by": scaled_by, "held": held}


def _is_passed_through(out: ir.Value) -> bool:
    node = out.producer()
    if node is None or node.op_type != "Identity" or not (out.name or "").endswith(RETAINED):
        return False
    source = node.inputs[0]
    return source is not None and source.is_graph_input() and out.name == f"{source.name}{RETAINED}"


def _perm(node: ir.Node) -> tuple[int, ...] | None:
    if node.op_type != "Transpose" or node.domain or "perm" not in node.attributes:
        return None
    return tuple(node.attributes["perm"].as_ints())


def _take_place(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Let ``value`` stand for the output of ``node``, and remove the node."""
    out = node.outputs[0]
    if out.is_graph_output():
        value.name, out.name = out.name, f"{out.name}_scaled"
    out.replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
