# SPDX-License-Identifier: BSD-3-Clause
"""Layers that are alike: found by structure, traced once, stamped for the others.

While a model is traced, the first layer of each kind (the *template*) runs between two marks, ``LayerIn`` and
``LayerOut``; the layers that follow it only leave an operator ``Layer``, and none of their tensors is an input.
Afterwards :func:`stamp` replaces each ``Layer`` by a copy of what lies between its template's marks, which reads the
follower's own tensors. Time and memory of an export then hardly depend on depth.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from QEfficient.export.caches import ShapeCache

DOMAIN = "qeff"
_INDEX = ("layer_idx", "layer_id", "layer_index")
_PRIVATE = {"_parameters", "_buffers", "_modules", "training", "forward", *_INDEX}


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a model.

    Attributes:
        path: Its place in the module tree.
        module: The layer.
        kind: Number of its structure; layers of one structure compute the same function of their inputs and tensors.
        index: Its index in the cache.
    """

    path: str
    module: nn.Module
    kind: int
    index: int


def find_layers(inner: nn.Module) -> list[Layer]:
    """Return the layers of ``inner`` that are alike: members of its outermost module lists with equal structure."""
    kinds: dict[Any, int] = {}
    found: list[tuple[str, nn.Module, int]] = []
    for path, module in inner.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{outer}.") for outer, _, _ in found):
            for name, child in module.named_children():
                found.append(
                    (f"{path}.{name}", child, kinds.setdefault(_structure(child, f"{path}.{name}"), len(kinds)))
                )
    alike = {kind for kind in range(len(kinds)) if sum(k == kind for _, _, k in found) > 1}
    layers = [(path, module, kind, _index(module)) for path, module, kind in found if kind in alike]
    return [Layer(path, module, kind, index) for path, module, kind, index in layers if index is not None]


def _index(module: nn.Module) -> int | None:
    """Return the cache index that a layer's attention names; ``None`` if there is none, or more than one."""
    found = {getattr(m, name) for m in module.modules() for name in _INDEX if isinstance(getattr(m, name, None), int)}
    return found.pop() if len(found) == 1 else None


def _structure(module: nn.Module, path: str) -> Any:
    """Return what decides what a module computes, but for its tensors' values, its adapter's scaling and its index.

    Args:
        module: The layer, or a part of it.
        path: The layer's place in the module tree: text that mentions it (PEFT notes it) says nothing of the layer.
    """
    ours = {"scaling"} if isinstance(module, BaseTunerLayer) else set()  # attention has a number of that name
    plain = tuple((k, _plain(v, path)) for k, v in sorted(vars(module).items()) if k not in _PRIVATE | ours)
    tensors = tuple(
        (name, None if t is None else (tuple(t.shape), t.dtype))
        for name, t in (*module._parameters.items(), *module._buffers.items())
    )
    parts = tuple((n, _structure(m, path)) for n, m in module._modules.items() if m is not None)
    return type(module), plain, tensors, parts


def _plain(value: Any, path: str, depth: int = 4) -> Any:
    if isinstance(value, str):
        return value.replace(path, "")
    if value is None or isinstance(value, bool | int | float | bytes | torch.dtype | torch.device):
        return value
    if depth == 0:
        return type(value)
    if isinstance(value, dict):
        items = ((str(k), _plain(v, path, depth - 1)) for k, v in value.items())
        return tuple(sorted(items, key=lambda item: item[0]))
    if isinstance(value, set | frozenset):
        return tuple(sorted((_plain(v, path, depth - 1) for v in value), key=repr))
    if isinstance(value, list | tuple):
        return tuple(_plain(v, path, depth - 1) for v in value)
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, nn.Module):
        return _structure(value, path)
    if callable(value):
        return getattr(value, "__qualname__", type(value))
    inside = {k: v for k, v in getattr(value, "__dict__", {}).items() if k not in _INDEX}
    return type(value), _plain(inside, path, depth - 1)


class _Replaced:
    """Context in which the layers' forward functions are ours."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        self.layers = list(layers)

    def __enter__(self) -> None:
        for layer in self.layers:
            layer.module.forward = functools.partial(self._run, layer, layer.module.forward)

    def __exit__(self, *_: object) -> None:
        for layer in self.layers:
            del layer.module.forward

    def _run(self, layer: Layer, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        return self.run(layer, forward, leaves, spec)

    def run(self, layer: Layer, forward: Callable[..., Any], leaves: list[Any], spec: Any) -> Any:
        """Return what the model gets for calling ``layer`` with the arguments ``leaves``."""
        raise NotImplementedError


class Learning(_Replaced):
    """Run only the first layer of each kind that is called in one way: the template.

    The others return, and write to the cache, what their template did. A template that writes to the cache in another
    way than at its own index is none: layers like it are traced in full. So are all layers of a model that calls one twice.

    Attributes:
        followers: The layers that follow a template, and which.
    """

    def __init__(self, layers: Iterable[Layer], cache: ShapeCache) -> None:
        super().__init__(layers)
        self.cache = cache
        self.followers: list[tuple[Layer, Layer]] = []
        self._templates: dict[Any, tuple[Layer, Any]] = {}
        self._kept: list[Any] = []  # arguments are told apart by identity, so they have to live
        self._called: set[str] = set()
        self._twice = False

    def run(self, layer: Layer, forward: Callable[..., Any], leaves: list[Any], spec: Any) -> Any:
        """Run a template, or repeat what it returned."""
        way = (layer.kind, str(spec), *(_signature(leaf) for leaf in leaves))
        if layer.path in self._called:
            self._twice = True
            self.followers.clear()
        self._called.add(layer.path)
        if way in self._templates and not self._twice:
            template, result = self._templates[way]
            self.followers.append((layer, template))
            self.cache.shapes[layer.index] = self.cache.shapes[template.index]
            return result
        self._kept.append(leaves)
        before = set(self.cache.shapes)
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        result = forward(*args, **kwargs)
        if set(self.cache.shapes) - before == {layer.index}:
            self._templates[way] = (layer, result)
        return result


class Marking(_Replaced):
    """Leave marks around the templates, and one operator in place of every layer that follows one."""

    def __init__(self, followers: Iterable[tuple[Layer, Layer]]) -> None:
        self._template_of = {layer.path: template for layer, template in followers}
        templates = {template.path: template for template in self._template_of.values()}
        super().__init__([*templates.values(), *(layer for layer, _ in followers)])
        self._results: dict[str, tuple[list[Any], Any]] = {}

    def run(self, layer: Layer, forward: Callable[..., Any], leaves: list[Any], spec: Any) -> Any:
        """Run a template between its marks, or leave one operator in place of a layer that follows it."""
        template = self._template_of.get(layer.path, layer)
        tensors = _only_tensors(leaves)
        if template is layer:
            leaves = _replace(leaves, _emit("LayerIn", layer, layer, tensors, tensors))
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            self._results[layer.path] = pytree.tree_flatten(forward(*args, **kwargs))
        results, result_spec = self._results[template.path]
        outputs = _only_tensors(results)
        op, inputs = ("LayerOut", outputs) if template is layer else ("Layer", tensors)
        return pytree.tree_unflatten(_replace(results, _emit(op, layer, template, inputs, outputs)), result_spec)


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return str(leaf.dtype), tuple(str(d) for d in leaf.shape)
    simple = leaf is None or isinstance(leaf, bool | int | float | str)
    return leaf if simple else (type(leaf).__name__, id(leaf))


def _only_tensors(leaves: list[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _replace(leaves: list[Any], tensors: list[Tensor]) -> list[Any]:
    replaced = iter(tensors)
    return [next(replaced) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _emit(op: str, layer: Layer, template: Layer, inputs: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """Emit an operator of :data:`DOMAIN`; complex tensors pass it as pairs, for ONNX has none."""
    pairs = [torch.view_as_real(t) if t.is_complex() else t for t in like]
    made = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{op}",
        [torch.view_as_real(t) if t.is_complex() else t for t in inputs],
        {"template": template.path, "path": layer.path},
        dtypes=[t.dtype for t in pairs],
        shapes=[t.shape for t in pairs],
        version=1,
    )
    return [torch.view_as_complex(new) if old.is_complex() else new for new, old in zip(made, like, strict=True)]


def stamp(model: ir.Model, own: Mapping[str, Mapping[str, str]]) -> None:
    """Replace every ``Layer`` by a copy of its template's nodes, and take the marks away.

    Args:
        model: A traced graph whose inputs and outputs have the contract's names.
        own: For each path of a follower: the names of the template's own inputs and outputs -> the follower's. What the
            graph lacks of the latter is added.
    """
    graph = model.graph
    ends = {op: {_path(n): n for n in graph if (n.domain, n.op_type) == (DOMAIN, op)} for op in ("LayerIn", "LayerOut")}
    for stub in [node for node in graph if (node.domain, node.op_type) == (DOMAIN, "Layer")]:
        template = stub.attributes["template"].as_string()
        _copy(graph, stub, ends["LayerIn"][template], ends["LayerOut"][template], own[_path(stub)])
    for node in (*ends["LayerIn"].values(), *ends["LayerOut"].values()):
        for before, after in zip(node.inputs, node.outputs, strict=True):
            _pass_on(after, before)
        graph.remove(node, safe=True)
    model.opset_imports.pop(DOMAIN, None)


def _path(node: ir.Node) -> str:
    return node.attributes["path"].as_string()


def _copy(graph: ir.Graph, stub: ir.Node, first: ir.Node, last: ir.Node, own: Mapping[str, str]) -> None:
    """Put a copy of what lies between ``first`` and ``last`` in the place of ``stub``."""
    inputs, outputs = {v.name: v for v in graph.inputs}, {v.name: v for v in graph.outputs}
    values: dict[ir.Value | None, ir.Value | None] = dict(zip(first.outputs, stub.inputs, strict=True))
    for theirs, ours in own.items():
        if theirs in inputs:
            values[inputs[theirs]] = inputs.get(ours) or _add_input(graph, inputs[theirs], ours)
    states = [outputs[theirs] for theirs in own if theirs in outputs]
    old, new = _path(first), _path(stub)
    for node in _body(graph, set(values), {*last.inputs, *states}, last):
        copied = ir.Node(
            node.domain,
            node.op_type,
            [values.get(v, v) for v in node.inputs],
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            version=node.version,
            metadata_props={
                k: f"{v}]".replace(f"{old}.", f"{new}.").replace(f"{old}'", f"{new}'")[:-1]
                for k, v in node.metadata_props.items()
            },
        )
        for mine, its in zip(copied.outputs, node.outputs, strict=True):
            mine.shape, mine.type, mine.name = its.shape, its.type, f"{new}/{its.name}"
            values[its] = mine
        graph.insert_before(stub, copied)
    for state in states:
        written = values[state]
        if written is not None:
            written.name = own[str(state.name)]
            graph.outputs.append(written)
    for result, final in zip(stub.outputs, last.inputs, strict=True):
        _pass_on(result, values.get(final, final))
    graph.remove(stub, safe=True)


def _pass_on(old: ir.Value, new: ir.Value | None) -> None:
    """Let everything that reads ``old`` read ``new``."""
    if new is not None:
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _add_input(graph: ir.Graph, like: ir.Value, name: str) -> ir.Value:
    made = ir.Value(name=name, shape=like.shape, type=like.type)
    graph.inputs.append(made)
    return made


def _body(graph: ir.Graph, given: set[ir.Value | None], wanted: set[ir.Value | None], last: ir.Node) -> list[ir.Node]:
    """Return the nodes before ``last`` that depend on what is given and that what is wanted depends on, in order.

    Nodes that depend on nothing given (masks, rotary angles) are the same for every layer, and stay shared.
    """
    inside = []
    for node in graph:
        if node is last:
            break
        if node.domain != DOMAIN and any(v in given for v in node.inputs):
            given.update(node.outputs)
            inside.append(node)
    body = []
    for node in reversed(inside):
        if any(o in wanted for o in node.outputs):
            wanted.update(v for v in node.inputs if v is not None)
            body.append(node)
    return body[::-1]
