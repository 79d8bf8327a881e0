# SPDX-License-Identifier: BSD-3-Clause
"""PyTorch → ONNX: from a model to a whole graph folder, or straight to the one that is already there."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import xxhash
from safetensors.numpy import save_file
from torch import Tensor, nn

from QEfficient.contract import ALL_TARGETS, MANIFEST_FILE, MODEL_FILE, NEUTRAL_FILE, ONE_TOKEN, Manifest
from QEfficient.errors import ArtifactError, ConfigError, UnsupportedError
from QEfficient.export.lift import Lifted, base_name, graph_fields, inner_model, lift, plain, refuse, shapes_graph
from QEfficient.export.skeleton import longest_context, skeleton_of
from QEfficient.export.trace import Traced, trace
from QEfficient.export.transforms import FoldConstants, NameNodes, Pass, RetainAdapter, StaticReshape
from QEfficient.export.weights import (
    WEIGHTS_CHOICES,
    Checkpoint,
    CheckpointIndex,
    TensorRef,
    holds,
    identity_of,
    link_weights,
)
from QEfficient.store import record_file, verify_files, written_aside

LOGITS_CHOICES = ("last", "all")
_VERSIONED = ("efficient-transformers", "torch", "transformers", "peft", "onnx", "onnxscript")


@dataclass(frozen=True, slots=True)
class Neutral:
    """What makes adapter inputs nothing.

    Attributes:
        tensors: Values by input name, where they are not zero.
        apart: Whether one target's values make it nothing, whatever the others hold.
    """

    tensors: Mapping[str, np.ndarray]
    apart: bool = True


def export_graph(
    model: nn.Module,
    destination: Path,
    *,
    adapter_name: str | None = None,
    checkpoint: Checkpoint | None = None,
    logits: str = "last",
    weights: str = "linked",
    neutral: Callable[[], Neutral] | None = None,
) -> Path:
    """Export ``model`` to ``<destination>-<hash>/``, unless that graph is already there and whole.

    Args:
        model: A transformers causal LM, or a ``PeftModel`` around one; left as it was.
        destination: Folder name without the hash.
        adapter_name: The adapter whose structure the graph takes; its tensors become inputs.
        checkpoint: Files that the base was loaded from. If they hold exactly what the model holds (a model without
            memory, on ``meta``, is taken at its word), they are linked; otherwise the model's weights are written.
        logits: ``"last"`` or ``"all"``: see the contract.
        weights: ``"linked"``; ``"written"``: files of the checkpoint are copied, so that the folder stands alone;
            ``"absent"``: ``checkpoint`` is a :class:`CheckpointIndex`, and the graph cannot be run.
        neutral: Returns the values of adapter inputs that make the graph the bare base.

    Returns:
        The graph's folder.

    Raises:
        ConfigError: ``logits`` or ``weights`` is none of those.
        UnsupportedError: The model or method cannot be exported; says why.
    """
    prepared = prepare_graph(
        model, destination, adapter_name=adapter_name, checkpoint=checkpoint, logits=logits, weights=weights
    )
    return save_graph(prepared, neutral)


def prepare_graph(
    model: nn.Module,
    destination: Path,
    *,
    adapter_name: str | None = None,
    checkpoint: Checkpoint | None = None,
    logits: str = "last",
    weights: str = "linked",
) -> "Prepared":
    """Do what :func:`export_graph` does before it writes a file; the arguments are its own."""
    if logits not in LOGITS_CHOICES:
        raise ConfigError(f"logits must be one of {', '.join(LOGITS_CHOICES)}, not {logits!r}")
    if weights not in WEIGHTS_CHOICES or (weights == "absent") != isinstance(checkpoint, CheckpointIndex):
        raise ConfigError(f"weights must be one of {', '.join(WEIGHTS_CHOICES)} (absent: of an index), not {weights!r}")
    if adapter_name is not None:
        config = model.peft_config[adapter_name]  # type: ignore[index]
        refuse(config)  # type: ignore[arg-type]
        if not shapes_graph(config):  # type: ignore[arg-type]
            model, adapter_name = inner_model(model), None
    skeleton = skeleton_of(model)
    if adapter_name is not None and skeleton.active_adapter != adapter_name:
        skeleton.set_adapter(adapter_name)  # type: ignore[operator]
    lifted = lift(skeleton, adapter_name)
    base = _Base.of(model, lifted, checkpoint)
    manifest = _describe(skeleton, lifted, adapter_name, base, logits, weights)
    folder = Path(f"{destination}-{manifest.hash}")
    if is_whole(folder):
        return Prepared(folder, manifest, base, None)
    try:
        traced = trace(skeleton, lifted, adapter_name, logits=logits)
    except UnsupportedError as e:
        if adapter_name is None or not _base_alone(model, logits):
            raise
        raise UnsupportedError(
            f"{e}. The base alone can be exported: if PEFT can merge the adapter, --merge exports the merged model"
        ) from e
    passes: tuple[Pass, ...] = (
        FoldConstants(),
        StaticReshape(),
        NameNodes(),
        RetainAdapter(tuple(a.name for a in traced.adapter)),
    )
    for step in passes:
        step.apply(traced.model)
    # Now, while the weights are inputs still: the checker refuses to look at hard-linked files.
    onnx.checker.check_model(ir.to_proto(traced.model), full_check=True)
    return Prepared(folder, manifest, base, traced)


def _base_alone(model: nn.Module, logits: str) -> bool:
    """Whether a ``PeftModel``'s base can be traced without its adapters."""
    skeleton = skeleton_of(model)
    try:
        base = skeleton.unload()  # type: ignore[operator]
        trace(base, lift(base, None), None, logits=logits)
    except (AttributeError, UnsupportedError):  # some methods cannot be taken out again
        return False
    return True


def save_graph(prepared: "Prepared", neutral: Callable[[], Neutral] | None = None) -> Path:
    """Write a prepared graph's folder aside and move it in, unless it is there; return it. The model can be saved once."""
    folder, base, traced = prepared.folder, prepared.base, prepared.traced
    if traced is None:
        return folder
    with written_aside(folder, is_whole=is_whole) as aside:
        _write(traced, base, aside, copy=prepared.manifest.options.get("weights") == "written")
        options = prepared.manifest.options | ({ONE_TOKEN: True} if traced.one_token else {})
        if neutral is not None and traced.adapter:
            none = neutral()
            if none.tensors:
                save_file(dict(none.tensors), str(aside / NEUTRAL_FILE))
            options |= {} if none.apart else {ALL_TARGETS: True}
        files = {
            p.name: record_file(p, base.checkpoint.known(p) if base.checkpoint else None)
            for p in sorted(aside.iterdir())
        }
        replace(prepared.manifest, states=traced.states, adapter=traced.adapter, files=files, options=options).write(
            aside
        )
    return folder


def is_whole(folder: Path) -> bool:
    """Return whether ``folder`` holds a graph as it was written."""
    if not (folder / MANIFEST_FILE).is_file():
        return False
    try:
        verify_files(folder, Manifest.read(folder).files)
    except ArtifactError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class _Base:
    """Where the base's weights come from.

    Attributes:
        checkpoint: Files to link, or ``None``.
        memory: Weights to write, by graph name; empty if the files are linked.
        buffers: Small tensors computed from the configuration (rotary frequencies): they go into the graph itself.
        aliases: Names under which a checkpoint may hold each tensor: tied weights have several.
    """

    checkpoint: Checkpoint | None
    memory: dict[str, Tensor]
    buffers: dict[str, Tensor]
    aliases: dict[str, list[str]]

    @classmethod
    def of(cls, model: nn.Module, lifted: Lifted, checkpoint: Checkpoint | None) -> "_Base":
        inner = inner_model(model)
        real = dict(inner.named_parameters(remove_duplicate=False)) | dict(inner.named_buffers(remove_duplicate=False))
        aliases: dict[str, list[str]] = {name: [] for name in lifted.base}
        paths: dict[str, str] = {}
        for path, name in lifted.sites.items():
            if name in aliases:
                aliases[name].append(base_name(path, inner))
                paths.setdefault(name, path)
        in_files = checkpoint.refs if checkpoint else {}
        buffers = {
            name: tensor
            for name, tensor in lifted.base.items()
            if tensor.device.type != "meta" and not any(alias in in_files for alias in aliases[name])
        }
        weights = {n: real[paths[n]].detach() for n in lifted.base if n not in buffers}
        if checkpoint and (_on_meta(weights) or holds(checkpoint, weights, aliases)):
            return cls(checkpoint, {}, buffers, aliases)
        if _on_meta(weights):
            raise ArtifactError("the model has no weights in memory, and no checkpoint was given that holds them")
        return cls(None, weights, buffers, aliases)

    def identity(self) -> str:
        """Return a digest of the weights."""
        return self.checkpoint.identity() if self.checkpoint else identity_of(dict(sorted(self.memory.items())))


@dataclass(frozen=True, slots=True)
class Prepared:
    """A graph before it is written.

    Attributes:
        folder: Where it goes, or lies.
        manifest: Without states and files.
        base: Where the base's weights come from.
        traced: The graph; ``None`` if it is there already, and whole.
    """

    folder: Path
    manifest: Manifest
    base: _Base
    traced: Traced | None


def _on_meta(tensors: Mapping[str, Tensor]) -> bool:
    return any(t.device.type == "meta" for t in tensors.values())


def _describe(
    skeleton: nn.Module,
    lifted: Lifted,
    adapter_name: str | None,
    origin: _Base,
    logits: str,
    weights: str,
) -> Manifest:
    """Return the manifest without states and files; its hash covers everything that shapes the graph."""
    config = inner_model(skeleton).config
    text = config.get_text_config()  # type: ignore[union-attr, operator]
    base = {
        "architecture": type(inner_model(skeleton)).__name__,
        "config": _config_dict(config),
        "weights": origin.identity(),
    }
    peft_config = plain(skeleton.peft_config[adapter_name].to_dict()) if adapter_name is not None else {}  # type: ignore[union-attr, index]
    versions = {name: version(name) for name in _VERSIONED}
    shaping = [base, graph_fields(peft_config), _inputs(lifted), logits, versions]
    if weights != "linked":
        shaping.append(weights)
    digest = xxhash.xxh3_64_hexdigest(json.dumps(shaping, sort_keys=True).encode())
    name = str(getattr(config, "_name_or_path", ""))
    return Manifest(
        hash=digest,
        base={"name_or_path": name, **base},
        peft_config=peft_config,
        states=(),
        adapter=(),
        logits=logits,
        vocab_size=int(text.vocab_size),
        max_positions=longest_context(inner_model(skeleton)),
        versions=versions,
        options={"logits": logits} | ({} if weights == "linked" else {"weights": weights}),
        absent=origin.checkpoint.shards if isinstance(origin.checkpoint, CheckpointIndex) else (),
    )


def _inputs(lifted: Lifted) -> list[tuple[str, list[int]]]:
    """Return adapter tensors and scalings with their shapes, the rank (which is dynamic) as -1."""
    shapes = [
        (name, [-1 if axis == lifted.rank_axes.get(name) else size for axis, size in enumerate(tensor.shape)])
        for name, tensor in lifted.adapter.items()
    ]
    return shapes + [(name, []) for name in lifted.scalings]


def _config_dict(config: Any) -> dict[str, Any]:
    """Return the base's configuration without what does not shape the graph: its place and its writer's version."""
    drop = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation"}
    return {k: plain(v) for k, v in config.to_dict().items() if k not in drop}


def _write(traced: Traced, base: _Base, folder: Path, *, copy: bool) -> None:
    """Turn base inputs into initializers and save the graph."""
    graph = traced.model.graph
    inputs = {v.name: v for v in graph.inputs}
    used = [name for name in traced.base if inputs[name].uses()]
    wanted = {n: base.aliases[n] for n in used if n not in base.buffers}
    memory = {n: base.memory[n] for n in wanted if n in base.memory}
    placed = link_weights(wanted, base.checkpoint, memory, folder, copy=copy)
    for name in traced.base:
        graph.inputs.remove(inputs[name])
    for name in used:
        if name in base.buffers:
            inputs[name].const_value = ir.tensor(base.buffers[name].numpy(), name=name)
            graph.initializers.add(inputs[name])
        elif name in placed:
            _initialize(traced.model, inputs[name], placed[name], folder)
        else:
            source = base.checkpoint.folder if base.checkpoint else "memory"
            raise ArtifactError(f"the base's weights ({source}) lack {name!r}, which the model needs")
    ir.save(traced.model, folder / MODEL_FILE)


def _initialize(model: ir.Model, value: ir.Value, ref: TensorRef, folder: Path) -> None:
    """Make ``value`` an initializer whose bytes lie in a file of ``folder``; half precision is cast where it is read."""
    shape = tuple(value.shape or ()) if ref.shape is None else ref.shape
    if tuple(shape) != tuple(value.shape or ()):
        raise ArtifactError(
            f"weight {value.name!r} has shape {ref.shape} in {ref.path.name}, the model needs {value.shape}"
        )
    location = str(ref.path.name) if ref.shape is not None else ref.path.as_posix()
    external = ir.ExternalTensor(
        location, ref.offset, ref.length, ref.dtype, shape=ir.Shape(shape), name=value.name or "", base_dir=folder
    )
    if ref.dtype != value.dtype:
        node = ir.node("Cast", [ir.Value(name=value.name)], {"to": int(value.dtype or 1)}, name=f"{value.name}/Cast")
        stored = node.inputs[0]
        output = node.outputs[0]
        output.name, output.shape, output.type = f"{value.name}.float32", value.shape, value.type
        ir.convenience.replace_all_uses_with(value, output)
        model.graph.insert_before(model.graph[0], node)
        value = stored  # type: ignore[assignment]
        value.shape, value.type = ir.Shape(shape), ir.TensorType(ref.dtype)
    value.const_value = external
    model.graph.initializers.add(value)
