# SPDX-License-Identifier: BSD-3-Clause
"""When an engine disagrees with PyTorch: which part of the adapter does it leave out?

The adapter is loaded again without one of its features at a time; the engine's logits may be those of such a variant.
"""

import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from QEfficient.contract import BASE
from QEfficient.testing.candidate import Candidate
from QEfficient.testing.check import Facts, Finding, failed, passed, skipped
from QEfficient.testing.compare import LOGITS_TOLERANCE, Logits, apart
from QEfficient.testing.reference import Reference
from QEfficient.testing.text import number

_TRIAL = "qefficient_without"


@dataclass(frozen=True, slots=True)
class Feature:
    """Something that an adapter may have, and how to take it away.

    Attributes:
        name: In words, behind "without".
        fields: Values of ``adapter_config.json`` that switch it off.
        drop: Pattern of tensors that only it has.
        zero: Pattern of tensors that are neutral when zero.
    """

    name: str
    fields: dict[str, Any]
    drop: str = ""
    zero: str = ""


FEATURES = (
    Feature("DoRA's magnitude", {"use_dora": False}, drop=r"lora_magnitude_vector"),
    Feature("lora_bias", {"lora_bias": False}, drop=r"lora_B\.bias$"),
    Feature("rsLoRA's scaling (alpha / r instead of alpha / √r)", {"use_rslora": False}),
    Feature("alpha_pattern", {"alpha_pattern": {}}),
    Feature("the embedding's update", {}, zero=r"lora_embedding_B"),
    Feature("the output projection's update", {}, zero=r"\b(lm_head|embed_out)\..*lora_B"),
    Feature("the attention's updates", {}, zero=r"\b(self_attn|attn|attention)\..*lora_B"),
    Feature("the feed-forward updates", {}, zero=r"\bmlp\..*lora_B"),
)


def ask_features(candidate: Candidate, subject: str) -> Finding:
    """Name the feature without which PyTorch gives the engine's logits."""
    got, last = candidate.first_logits(subject), candidate.workload.prompt_lengths[0] - 1
    reference = candidate.reference
    error = apart(got, reference.workload_logits(subject)[0][last])
    if error <= LOGITS_TOLERANCE:
        return passed("The logits are those of the adapter with all that it has.", error)
    variants = [("the adapter (the bare base)", reference.untouched[0][last])]
    variants += [(n, logits[last]) for n, logits in _variants(reference, subject)]
    errors = {name: apart(got, logits) for name, logits in variants}
    facts: Facts = {f"off, without {n}": number(e, "of range") for n, e in errors.items()}
    nearest = min(errors, key=lambda n: errors[n])
    if errors[nearest] <= LOGITS_TOLERANCE:
        text = f"It behaves like {subject!r} without {nearest}: {number(errors[nearest])} of the range from that, {number(error)} from the adapter"
        return failed(f"{text}. Use a tool that supports it, or train without it.", error, facts)
    return skipped(f"It is none of the adapter's parts that is left out; nearest is without {nearest}.")


def _variants(reference: Reference, subject: str) -> Iterator[tuple[str, Logits]]:
    """Yield the logits ``(tokens, V)`` of the first row for the adapter without each feature that it has."""
    source = reference.paths[subject]
    content = json.loads((source / "adapter_config.json").read_text())
    tensors = load_file(source / "adapter_model.safetensors")
    for feature in FEATURES:
        fields = {k: v for k, v in feature.fields.items() if content.get(k) and content[k] != v}
        pattern = feature.drop or feature.zero
        hit = [k for k in tensors if pattern and re.search(pattern, k)]
        if not fields and not (feature.zero and hit):
            continue
        kept = {k: np.zeros_like(v) if feature.zero and k in hit else v for k, v in tensors.items()}
        kept = {k: v for k, v in kept.items() if not (feature.drop and k in hit)}
        yield feature.name, _logits(reference, source, content | fields, kept)


def _logits(reference: Reference, source: Path, content: dict[str, Any], tensors: dict[str, Any]) -> Logits:
    with tempfile.TemporaryDirectory(prefix="qefficient-") as aside, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(shutil.copytree(source, Path(aside) / "adapter", ignore=shutil.ignore_patterns("*.safetensors")))
        (folder / "adapter_config.json").write_text(json.dumps(content))
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        try:
            reference.model.load_adapter(str(folder), adapter_name=_TRIAL)
            return reference.logits(_TRIAL, reference.workload.rows[0])
        finally:
            if _TRIAL in reference.model.peft_config:
                reference.model.delete_adapter(_TRIAL)
            reference.logits(BASE, reference.short[:1])
