# SPDX-License-Identifier: BSD-3-Clause
"""Checks of an adapter's files against the base's structure. No model runs: the base exists only as shapes."""

import copy
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from QEfficient.errors import AdapterMismatchError
from QEfficient.options import suggest
from QEfficient.store import digest_file
from QEfficient.testing.check import Check, Facts, Finding, failed, passed, skipped
from QEfficient.testing.report import Outcome
from QEfficient.testing.text import counted, listed, size

Shape = tuple[int, ...]
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """One adapter as it lies on disk, and what the base expects of it.

    Attributes:
        path: Folder, or Hub id.
        config: Its ``PeftConfig``.
        tensors: The tensors of its file.
        expected: Names and shapes that PEFT would save for this configuration on this base.
        optional: Names of the base's own tensors, which a file may hold besides (resized embeddings).
    """

    path: Path
    config: Any
    tensors: dict[str, npt.NDArray[Any]]
    expected: dict[str, Shape]
    optional: dict[str, Shape]


def expected_tensors(base_config: Any, config: Any, name: str) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Return what PEFT would save for ``config`` on the base, and the base's own tensors, names to shapes.

    Raises:
        AdapterMismatchError: PEFT cannot put such an adapter on this base.
    """
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = AutoModelForCausalLM.from_config(base_config)  # type: ignore[no-untyped-call]
            own = {_PREFIX + key: tuple(value.shape) for key, value in model.state_dict().items()}
            wrapped = PeftModel(model, copy.deepcopy(config), adapter_name="default", low_cpu_mem_usage=True)
            saved = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as e:
            first = str(e).strip().splitlines()[0]
            raise AdapterMismatchError(f"adapter {name!r} does not fit the base: {first}") from e
    return {key: tuple(value.shape) for key, value in saved.items()}, own


def refuse_other_shapes(name: str, files: AdapterFiles) -> None:
    """Refuse an adapter that was trained on a base of other shapes.

    Raises:
        AdapterMismatchError: Naming the first tensor that differs.
    """
    known = files.optional | files.expected
    for key, tensor in sorted(files.tensors.items()):
        if key in known and known[key] != tensor.shape:
            raise AdapterMismatchError(
                f"adapter {name!r} does not fit the base: {key} is {tensor.shape}, this base and the adapter's "
                f"configuration need {known[key]}. Was it trained on another base, or was its rank edited?"
            )


def _ask_files(files: AdapterFiles, subject: str) -> Finding:
    found = [p for p in (files.path / n for n in ("adapter_config.json", "adapter_model.safetensors")) if p.is_file()]
    facts: Facts = {p.name: f"{size(p.stat().st_size)}, xxh3 {digest_file(p)}" for p in found}
    types = sorted({str(t.dtype) for t in files.tensors.values()})
    facts |= {"method": str(files.config.peft_type.value), "tensors": len(files.tensors), "types": ", ".join(types)}
    if not files.tensors:
        return failed("The adapter's file holds no tensor at all. Save the adapter again.", facts=facts)
    return passed(f"Configuration and {counted(len(files.tensors), 'tensor')} can be read completely.", facts=facts)


def _ask_coverage(files: AdapterFiles, subject: str) -> Finding:
    missing = sorted(set(files.expected) - set(files.tensors))
    unused = sorted(set(files.tensors) - set(files.expected) - set(files.optional))
    total = len(files.expected)
    facts: Facts = {"modules": len({_module(k) for k in files.expected}), "tensors": total}
    if not missing and not unused:
        text = f"All {total} tensors land in a module of the base, and every targeted module has its tensors."
        return passed(text, 0, facts)
    facts |= {"without tensors": listed(missing, 8), "without module": listed(unused, 8)}
    said = []
    if missing:
        said.append(
            f"{len(missing)} of {total} tensors are missing, first {missing[0]}: PEFT fills them with fresh ones that do nothing"
        )
    if unused:
        hint = suggest(unused[0], files.expected).removeprefix("; ")
        said.append(
            f"{counted(len(unused), 'tensor')} of the file belong to no module, first {unused[0]}{f' ({hint})' if hint else ''}: PEFT drops them"
        )
    text = (
        "; ".join(said) + ". Check the names in the file, target_modules, and that this is the base it was trained on."
    )
    return failed(text, len(missing) + len(unused), facts)


def _ask_finite(files: AdapterFiles, subject: str) -> Finding:
    floats = {key: t.astype(np.float32) for key, t in files.tensors.items()}
    bad = {key: int((~np.isfinite(t)).sum()) for key, t in floats.items() if not np.isfinite(t).all()}
    if bad:
        first = next(iter(bad))
        text = f"{counted(len(bad), 'tensor')} hold NaN or infinity, first {first} ({bad[first]} of {floats[first].size} values)."
        return failed(f"{text} Training diverged or the file is damaged; go back to an earlier checkpoint.", len(bad))
    largest = max((float(np.abs(t).max()) for t in floats.values() if t.size), default=0.0)
    if largest > float(np.finfo(np.float16).max):
        text = f"The largest value is {largest:.3g}, more than float16 can hold; it becomes infinite in half precision."
        return Finding(Outcome.WARN, text, 0, {"largest value": largest})
    return passed("Every value of every tensor is finite.", 0, {"largest value": largest})


def _ask_effect(files: AdapterFiles, subject: str) -> Finding:
    factors = {key: t for key, t in files.tensors.items() if re.search(r"\.(lora|gralora|delora)_B\b", key)}
    if not factors:
        return skipped(
            f"{files.config.peft_type.value} has no factor that must not be zero; the PyTorch stage measures its effect."
        )
    dead = sorted(key for key, t in factors.items() if not np.any(t))
    if len(dead) == len(factors):
        text = f"All {len(dead)} lora_B tensors are zero: the adapter does nothing. It was saved before it was trained."
        return failed(text, 1.0)
    if dead:
        text = f"{len(dead)} of {len(factors)} lora_B tensors are zero, first {dead[0]}: these modules are not adapted."
        return Finding(Outcome.WARN, text, len(dead) / len(factors), {"zero": listed(dead, 8)})
    return passed(f"None of the {len(factors)} lora_B tensors is all zero.", 0.0)


def _module(key: str) -> str:
    """Return the module that a tensor belongs to."""
    return re.sub(r"\.[^.]*(lora|ia3|oft|hada|lokr|vera)_?[^.]*(\.weight|\.bias)?$", "", key)


CHECKS: tuple[Check[AdapterFiles], ...] = (
    Check("files", "Files are whole", "A truncated or empty file may load without an error.", _ask_files),
    Check(
        "coverage",
        "Adapter reaches its modules",
        "No tensor may be left over and no module left out: PEFT only warns, and the model runs as if it had no adapter.",
        _ask_coverage,
        tolerance=0,
        unit="misplaced tensors",
    ),
    Check(
        "finite",
        "Values are finite",
        "One NaN makes every output NaN, and PEFT loads it without a word.",
        _ask_finite,
        tolerance=0,
        unit="damaged tensors",
    ),
    Check(
        "effect",
        "Tensors are not all zero",
        "LoRA starts with lora_B = 0, so an untrained adapter changes nothing; at least one must have moved.",
        _ask_effect,
        unit="of tensors zero",
    ),
)
"""Asked of each adapter, in this order."""
