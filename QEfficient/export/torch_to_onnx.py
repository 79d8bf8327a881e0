# SPDX-License-Identifier: BSD-3-Clause
"""PyTorch → ONNX: from a model to a whole graph folder, or straight to the one that is already there."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
import xxhash
from torch import Tensor, nn

from QEfficient.contract import MANIFEST_FILE, MODEL_FILE, Manifest
from QEfficient.errors import ArtifactError, ConfigError
from QEfficient.export.lift import Lifted, graph_fields, inner_model, lift, plain
from QEfficient.export.skeleton import skeleton_of
from QEfficient.export.trace import Traced, trace
from QEfficient.export.transforms import FoldConstants, NameNodes, Pass, RetainAdapter
from QEfficient.export.weights import Checkpoint, TensorRef, identity_of, link_weights
from QEfficient.store import record_file, verify_files, written_aside

LOGITS_CHOICES = ("last", "all")
_VERSIONED = ("efficient-transformers", "torch", "transformers", "peft", "onnx", "onnxscript")


def export_graph(
    model: nn.Module,
    destination: Path,
    *,
    adapter_name: str | None = None,
    checkpoint: Checkpoint | None = None,
    logits: str = "last",
) -> Path:
    """Export ``model`` to ``<destination>-<hash>/``, unless that graph is already there and whole.

    Args:
        model: A transformers causal LM, or a ``PeftModel`` around one; left as it was.
        destination: Folder name without the hash.
        adapter_name: The adapter whose structure the graph takes; its tensors become inputs.
        checkpoint: Files that hold the base's weights: they are linked, and the model's own are not looked at.
            ``None`` writes the model's weights beside the graph.
        logits: ``"last"`` or ``"all"``: see the contract.

    Returns:
        The graph's folder.

    Raises:
        ConfigError: ``logits`` is neither of the two.
        UnsupportedError: The model or method cannot be exported; says why.
    """
    if logits not in LOGITS_CHOICES:
        raise ConfigError(f"logits must be one of {', '.join(LOGITS_CHOICES)}, not {logits!r}")
    skeleton = skeleton_of(model)
    lifted = lift(skeleton, adapter_name)
    memory = _base_tensors(model, lifted) if checkpoint is None else {}
    manifest = _describe(skeleton, lifted, adapter_name, checkpoint, memory, logits)
    folder = Path(f"{destination}-{manifest.hash}")
    if is_whole(folder):
        return folder
    traced = trace(skeleton, lifted, adapter_name, logits=logits)
    passes: tuple[Pass, ...] = (FoldConstants(), NameNodes(), RetainAdapter(tuple(a.name for a in traced.adapter)))
    for step in passes:
        step.apply(traced.model)
    with written_aside(folder) as aside:
        _write(traced, lifted, checkpoint, memory, aside)
        _manifest_with(manifest, traced, checkpoint, aside).write(aside)
    return folder


def is_whole(folder: Path) -> bool:
    """Return whether ``folder`` holds a graph as it was written; a damaged one is removed from the way."""
    if not (folder / MANIFEST_FILE).is_file():
        return False
    try:
        verify_files(folder, Manifest.read(folder).files)
    except ArtifactError:
        return False
    return True


def _base_tensors(model: nn.Module, lifted: Lifted) -> dict[str, Tensor]:
    """Return the real tensors of ``model`` for the base names of its skeleton."""
    inner = inner_model(model)
    real = dict(inner.named_parameters(remove_duplicate=False)) | dict(inner.named_buffers(remove_duplicate=False))
    return {name: real[path].detach() for path, name in reversed(lifted.sites.items()) if name in lifted.base}


def _describe(
    skeleton: nn.Module,
    lifted: Lifted,
    adapter_name: str | None,
    checkpoint: Checkpoint | None,
    memory: Mapping[str, Tensor],
    logits: str,
) -> Manifest:
    """Return the manifest without states and files; its hash covers everything that shapes the graph."""
    config = inner_model(skeleton).config
    text = config.get_text_config()  # type: ignore[union-attr, operator]
    base = {
        "architecture": type(inner_model(skeleton)).__name__,
        "config": _config_dict(config),
        "weights": checkpoint.identity() if checkpoint else identity_of(dict(sorted(memory.items()))),
    }
    peft_config = plain(skeleton.peft_config[adapter_name].to_dict()) if adapter_name is not None else {}  # type: ignore[union-attr, index, operator]
    versions = {name: version(name) for name in _VERSIONED}
    inputs = [(n, [str(d) for d in t.shape]) for n, t in _ranked(lifted)] + sorted(lifted.scalings)
    shaping = [base, graph_fields(peft_config), inputs, logits, versions]
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
        max_positions=int(getattr(text, "max_position_embeddings", 0) or 0),
        versions=versions,
        options={"logits": logits},
    )


def _ranked(lifted: Lifted) -> list[tuple[str, Tensor]]:
    """Return adapter tensors as the graph sees them: the rank, which is dynamic, set to one."""
    from QEfficient.export.lift import rank_axis

    out = []
    for name, tensor in lifted.adapter.items():
        axis = rank_axis(name)
        shape = [1 if i == axis else n for i, n in enumerate(tensor.shape)]
        out.append((name, torch.empty(shape, device="meta")))
    return out


def _config_dict(config: Any) -> dict[str, Any]:
    """Return the base's configuration without what does not shape the graph: its place and its writer's version."""
    drop = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation"}
    return {k: plain(v) for k, v in config.to_dict().items() if k not in drop}


def _write(traced: Traced, lifted: Lifted, checkpoint: Checkpoint | None, memory: Mapping[str, Tensor], folder: Path) -> None:
    """Turn base inputs into initializers and save the graph."""
    graph = traced.model.graph
    aliases: dict[str, list[str]] = {name: [] for name in lifted.base}
    for path, name in lifted.sites.items():
        if name in aliases:
            aliases[name].append(path.replace(".base_layer", "").replace(".original_module", ""))
    inputs = {v.name: v for v in graph.inputs}
    used = {n: names for n, names in aliases.items() if inputs[n].uses()}
    buffers = {n: t for n, t in lifted.base.items() if t.device.type != "meta"}
    in_files = checkpoint.refs if checkpoint else {}
    written = {n: memory[n] for n in used if n in memory and n not in buffers}
    small = {n: buffers[n] for n in used if n in buffers and not any(a in in_files for a in used[n])}
    placed = link_weights({n: a for n, a in used.items() if n not in small}, checkpoint, written, folder)
    missing = [n for n in used if n not in placed and n not in small]
    if missing:
        raise ArtifactError(f"the checkpoint {checkpoint.folder if checkpoint else ''} lacks the weight {missing[0]!r}")
    for name in traced.base:
        graph.inputs.remove(inputs[name])
    for name in used:
        _initialize(traced.model, inputs[name], placed.get(name), small.get(name), folder)
    ir.save(traced.model, folder / MODEL_FILE)
    onnx.checker.check_model(str(folder / MODEL_FILE))


def _initialize(model: ir.Model, value: ir.Value, ref: TensorRef | None, small: Tensor | None, folder: Path) -> None:
    """Make ``value`` an initializer: bytes in a file, or a small tensor in the graph; half precision is cast."""
    if ref is None:
        value.const_value = ir.tensor((small.numpy() if small is not None else None), name=value.name)
        model.graph.initializers.add(value)
        return
    if tuple(ref.shape) != tuple(value.shape or ()):
        raise ArtifactError(f"weight {value.name!r} has shape {ref.shape} in {ref.path.name}, the model needs {value.shape}")
    location = str(ref.path.name)
    external = ir.ExternalTensor(
        location, ref.offset, ref.length, ref.dtype, shape=ir.Shape(ref.shape), name=value.name or "", base_dir=folder
    )
    if ref.dtype != value.dtype:
        node = ir.node("Cast", [ir.Value(name=value.name)], {"to": int(value.dtype or 1)}, name=f"{value.name}/Cast")
        stored = node.inputs[0]
        output = node.outputs[0]
        output.name, output.shape, output.type = f"{value.name}.float32", value.shape, value.type
        ir.convenience.replace_all_uses_with(value, output)
        model.graph.insert_before(model.graph[0], node)
        value = stored  # type: ignore[assignment]
        value.shape, value.type = ir.Shape(ref.shape), ir.TensorType(ref.dtype)
    value.const_value = external
    model.graph.initializers.add(value)


def _manifest_with(manifest: Manifest, traced: Traced, checkpoint: Checkpoint | None, folder: Path) -> Manifest:
    from dataclasses import replace

    files = {p.name: record_file(p) for p in sorted(folder.iterdir()) if p.is_file()}
    return replace(manifest, states=traced.states, adapter=traced.adapter, files=files)
