# SPDX-License-Identifier: BSD-3-Clause
"""Export without loading the base: its configuration, and where its files keep what, are enough for most adapters."""

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from transformers import AutoModelForCausalLM

from QEfficient.contract import Manifest
from QEfficient.errors import AdapterMismatchError, UnsupportedError
from QEfficient.export.lift import Lifted, inner_model, lift, moves_base, shapes_graph
from QEfficient.export.torch_to_onnx import export_graph
from QEfficient.export.weights import INDEX_FILE, Checkpoint, CheckpointIndex
from QEfficient.peft.adapters import Adapter, check_name, fit, write_exported
from QEfficient.peft.auto import QEffAutoPeftModelForCausalLM
from QEfficient.peft.loading import check_base, checkpoint_folder, read_base_config
from QEfficient.peft.tasks import choose_task
from QEfficient.store import cache_root


def export_adapters(
    base: str | Path,
    adapters: Mapping[str, str | Path],
    destination: Path | None = None,
    *,
    logits: str = "last",
    weights: str = "linked",
    tasks: Mapping[str, int] | None = None,
) -> Path:
    """Export a base with adapters; the graph takes the first one's structure. Return the graph's folder.

    Where the base lies in safetensors files and the adapters bring all their tensors (LoRA does), no weight is loaded: a
    base far larger than memory can be exported. Otherwise the base is loaded.

    Args:
        base: Folder or Hub id.
        adapters: Folders or Hub ids, by name.
        destination: Folder name without the hash; default: in the cache of exported graphs.
        logits: ``"last"`` or ``"all"``.
        weights: ``"linked"``; ``"written"``: copied beside the graph; ``"absent"``: the graph is made from the base's
            configuration and index alone, and cannot be run until it is exported again with them.
        tasks: The task to take of adapters that hold several, by adapter.

    Raises:
        QEffError: As :meth:`QEffAutoPeftModelForCausalLM.from_base` and its ``export``.
    """
    check_base(base)
    read = {check_name(name): Adapter.load(path, name) for name, path in adapters.items()}
    found = checkpoint_folder(base)
    skeleton = skeleton_of(base, read) if found is not None and read else None
    if weights != "absent" and (found is None or skeleton is None):
        loaded = QEffAutoPeftModelForCausalLM.from_base(base, adapters)
        for name, task in (tasks or {}).items():
            choose_task(loaded.model, name, task)
        return loaded.export(destination, logits=logits, weights=weights).parent
    if found is None or skeleton is None:
        raise UnsupportedError(
            f"no graph without weights of base {str(base)!r}: "
            + (f"it has no {INDEX_FILE}" if found is None else "what leaves it as it is, is computed from its weights")
        )
    checkpoint = _checkpoint(base, found, weights)
    for name, task in (tasks or {}).items():
        choose_task(skeleton, name, task)
    architecture = type(inner_model(skeleton)).__name__
    target = destination or cache_root() / architecture / architecture
    folder = export_graph(
        skeleton, target, adapter_name=next(iter(read)), checkpoint=checkpoint, logits=logits, weights=weights
    )
    manifest = Manifest.read(folder)
    for name, adapter in read.items():
        whole = Adapter(name, adapter.config, adapter.tensors, lift(skeleton, name).scalings)
        try:
            fit(whole, manifest)
        except AdapterMismatchError:
            continue  # it needs a graph of its own
        write_exported(whole, folder)
    return folder


def _checkpoint(base: str | Path, folder: Path, weights: str) -> Checkpoint:
    if weights == "absent":
        return CheckpointIndex(folder, read_base_config(base).dtype or torch.float32)
    return Checkpoint(folder)


def skeleton_of(base: str | Path, adapters: Mapping[str, Adapter], *, held: bool = True) -> PeftModel | None:
    """Return base and adapters without memory; ``None`` if an adapter's file does not bring all that the graph takes, and no more.

    PEFT saves weights of the base, too, with an adapter of the embeddings or of ``lm_head``.

    Args:
        base: Folder or Hub id.
        adapters: By name.
        held: Hold the adapters' tensors against what their configurations put on the base.
    """
    configs = [adapter.config for adapter in adapters.values()]
    if not all(map(shapes_graph, configs)) or any(moves_base(vars(c)) for c in configs):
        return None  # virtual tokens run through the base's weights once; some initialisations change them
    if any(".base_layer." in tensor for adapter in adapters.values() for tensor in adapter.tensors):
        return None
    config = read_base_config(base)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.tie_weights()
    peft_model: PeftModel | None = None
    for name, adapter in adapters.items():
        if peft_model is None:
            peft_model = PeftModel(model, adapter.config, adapter_name=name, low_cpu_mem_usage=True)
        else:
            peft_model.add_adapter(name, adapter.config, low_cpu_mem_usage=True)
    if peft_model is None:
        return None
    for name, adapter in adapters.items():
        lifted = lift(peft_model, name)
        if lifted.rank_axes.keys() != lifted.adapter.keys():
            return None
        if held:
            _check(adapter, lifted)
    return peft_model


def _check(adapter: Adapter, lifted: Lifted) -> None:
    """Hold an adapter's file against the modules that its configuration puts on this base."""
    for name in sorted(lifted.adapter.keys() | adapter.tensors.keys()):
        have, want = adapter.tensors.get(name), lifted.adapter.get(name)
        given = "nothing" if have is None else list(have.shape)
        wanted = "nothing" if want is None else list(want.shape)
        if given != wanted:
            raise AdapterMismatchError(
                f"adapter {adapter.name!r} does not fit the base: its file has {given} for {name}, the base takes {wanted}"
            )
