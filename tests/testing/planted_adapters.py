# SPDX-License-Identifier: BSD-3-Clause
"""Faults planted into adapter folders: each with the check that must name it. Used by tests and ``benchmarks/faults.py``."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

Tensors = dict[str, np.ndarray]
Plant = Callable[[Path], None]


@dataclass(frozen=True)
class Fault:
    """One planted fault.

    Attributes:
        name: Short.
        checks: Names of checks, any of which names the fault rightly.
        plant: Damages a copied adapter folder; raises ``StopIteration`` where the fault cannot be planted.
        lora: Needs LoRA factors.
    """

    name: str
    checks: tuple[str, ...]
    plant: Plant
    lora: bool = False


def tensors(change: Callable[[Tensors], Any]) -> Plant:
    """Return what rewrites the tensors' file."""

    def plant(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        loaded = {k: v.copy() for k, v in load_file(path).items()}
        changed = change(loaded)
        save_file(loaded if changed is None else changed, path, metadata={"format": "pt"})

    return plant


def config(**fields: Any) -> Plant:
    """Return what edits ``adapter_config.json``; a function of the old value makes the new one."""

    def plant(folder: Path) -> None:
        path = folder / "adapter_config.json"
        content = json.loads(path.read_text())
        for key, value in fields.items():
            content[key] = value(content.get(key)) if callable(value) else value
        path.write_text(json.dumps(content))

    return plant


def one(pattern: str, change: Callable[[np.ndarray], np.ndarray]) -> Plant:
    """Return what changes the first tensor of a name."""

    def edit(loaded: Tensors) -> None:
        key = next(k for k in sorted(loaded) if re.search(pattern, k))
        loaded[key] = np.ascontiguousarray(change(loaded[key]))

    return tensors(edit)


def every(pattern: str, change: Callable[[np.ndarray], np.ndarray]) -> Plant:
    """Return what changes every tensor of a name."""

    def edit(loaded: Tensors) -> None:
        for key in [k for k in sorted(loaded) if re.search(pattern, k)] or [next(iter(()))]:
            loaded[key] = np.ascontiguousarray(change(loaded[key]))

    return tensors(edit)


def poke(value: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return what puts one value into a tensor."""

    def change(tensor: np.ndarray) -> np.ndarray:
        tensor.flat[tensor.size // 2] = value
        return tensor

    return change


def renamed(rename: Callable[[str], str]) -> Plant:
    """Return what renames every tensor."""
    return tensors(lambda loaded: {rename(k): v for k, v in loaded.items()})


def dropped(pattern: str) -> Plant:
    """Return what drops tensors."""

    def edit(loaded: Tensors) -> Tensors:
        left = {k: v for k, v in loaded.items() if not re.search(pattern, k)}
        if len(left) == len(loaded):
            raise StopIteration
        return left

    return tensors(edit)


def _swap_factors(loaded: Tensors) -> Tensors:
    return {re.sub(r"lora_([AB])", lambda m: "lora_B" if m[1] == "A" else "lora_A", k): v for k, v in loaded.items()}


def _copy_layer(loaded: Tensors) -> None:
    for key in [k for k in loaded if re.search(r"\.(layers|h)\.0\.", k)]:
        loaded[re.sub(r"\.(layers|h)\.0\.", r".\1.1.", key)] = loaded[key].copy()


def _short(names: list[str]) -> list[str]:
    return sorted({n.rsplit(".", 1)[-1] for n in names})


def _half(loaded: Tensors) -> Tensors:
    return dict(sorted(loaded.items())[::2])


def _truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


def _pickle(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.rename(path.with_suffix(".bin"))


def _tokenizer(tokens: dict[str, int]) -> Plant:
    def plant(folder: Path) -> None:
        (folder / "added_tokens.json").write_text(json.dumps(tokens))

    return plant


def _head(loaded: Tensors) -> None:
    loaded["base_model.model.lm_head.weight"] = np.random.default_rng(0).normal(size=(128, 64)).astype(np.float32)


_LAST_LAYER = r"\.(layers|h)\.1\."
_B = r"lora_B\.weight"

ADAPTER_FAULTS = (
    Fault("file truncated", ("adapter.files",), _truncate),
    Fault("file missing", ("adapter.files",), lambda f: (f / "adapter_model.safetensors").unlink()),
    Fault("only a pickle", ("adapter.files",), _pickle),
    Fault("no tensor at all", ("adapter.files", "adapter.coverage"), tensors(lambda t: {})),
    Fault("config missing", ("adapter.files",), lambda f: (f / "adapter_config.json").unlink()),
    Fault("config not JSON", ("adapter.files",), lambda f: (f / "adapter_config.json").write_text("{")),
    Fault("unknown method", ("adapter.files",), config(peft_type="NOPE")),
    Fault("trainer's leftovers", ("adapter.leftovers",), lambda f: (f / "optimizer.pt").write_bytes(b"0")),
    Fault("pickle beside", ("adapter.leftovers",), lambda f: (f / "adapter_model.bin").write_bytes(b"0")),
    Fault("r edited", ("adapter.shapes",), config(r=lambda r: 2 * r), lora=True),
    Fault("A and B swapped", ("adapter.shapes",), tensors(_swap_factors), lora=True),
    Fault("one tensor transposed", ("adapter.shapes",), one(_B, np.transpose), lora=True),
    Fault("all tensors transposed", ("adapter.shapes",), every(r"lora_[AB]\.weight", np.transpose), lora=True),
    Fault("prefix lost", ("adapter.coverage",), renamed(lambda k: k.removeprefix("base_model.model."))),
    Fault("adapter's name in the keys", ("adapter.coverage",), renamed(lambda k: k.replace(".weight", ".default.weight")), lora=True),
    Fault("modules renamed", ("adapter.coverage",), renamed(lambda k: k.replace("self_attn.", "attention.").replace("attn.", "att."))),
    Fault("half of the tensors missing", ("adapter.coverage",), tensors(_half)),
    Fault("last layer missing", ("adapter.coverage",), dropped(_LAST_LAYER)),
    Fault("one tensor dropped", ("adapter.coverage",), dropped(r"\.(layers|h)\.0\..*(q_proj|c_attn|k_proj|qkv_proj).*(lora_B|ia3_l|oft_R|hada_w1_a)")),
    Fault("module lost from the config", ("adapter.coverage", "adapter.shapes"), config(target_modules=["down_proj", "o_proj"]), lora=True),
    Fault("module added to the config", ("adapter.coverage",), config(modules_to_save=["norm", "ln_f"])),
    Fault("layers restricted", ("adapter.coverage",), config(layers_to_transform=[0], target_modules=_short), lora=True),
    Fault("DoRA magnitudes lost", ("adapter.coverage",), config(use_dora=True), lora=True),
    Fault("target that the base lacks", ("adapter.targets",), config(target_modules=lambda t: [*t, "w_pack"]), lora=True),
    Fault("modules_to_save that the base lacks", ("adapter.targets",), config(modules_to_save=["score"])),
    Fault("rank pattern of nothing", ("adapter.patterns",), config(rank_pattern={"w_pack": 64}), lora=True),
    Fault("alpha pattern of nothing", ("adapter.patterns",), config(alpha_pattern={"w_pack": 64}), lora=True),
    Fault("alpha zero", ("adapter.scaling",), config(lora_alpha=0), lora=True),
    Fault("alpha a thousandfold", ("adapter.scaling",), config(lora_alpha=lambda a: 1000 * a), lora=True),
    Fault("alpha a hundredfold", ("adapter.scaling",), config(lora_alpha=lambda a: 100 * a), lora=True),
    Fault("alpha negative", ("adapter.scaling",), config(lora_alpha=lambda a: -a), lora=True),
    Fault("modules_to_save lost from the config", ("adapter.own_weights",), tensors(_head)),
    Fault("task of a classifier", ("adapter.task",), config(task_type="SEQ_CLS")),
    Fault("a NaN", ("adapter.finite",), one(r"", poke(float("nan")))),
    Fault("an infinity", ("adapter.finite",), one(r"", poke(float("-inf")))),
    Fault("float16 overflow", ("adapter.finite", "adapter.outliers"), one(r"", poke(1e5))),
    Fault("untrained", ("adapter.effect",), every(_B, np.zeros_like), lora=True),
    Fault("all A zero", ("adapter.effect",), every(r"lora_A\.weight", np.zeros_like), lora=True),
    Fault("one module dead", ("adapter.effect",), one(_B, np.zeros_like), lora=True),
    Fault("everything zero", ("adapter.effect",), every(r"", np.zeros_like), lora=True),
    Fault("one tensor a thousandfold", ("adapter.outliers",), one(_B, lambda t: 1000 * t), lora=True),
    Fault("one value corrupted", ("adapter.outliers",), one(_B, poke(3e3)), lora=True),
    Fault("a layer over another", ("adapter.repeated",), tensors(_copy_layer), lora=True),
    Fault("tokens beyond the embedding", ("adapter.tokenizer",), _tokenizer({"<tool>": 128})),
    Fault("recorded base unknown", ("adapter.base",), config(base_model_name_or_path="someone/another-model")),
)  # fmt: skip
"""Faults of an adapter's folder alone."""
