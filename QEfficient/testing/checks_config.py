# SPDX-License-Identifier: BSD-3-Clause
"""Checks of what an adapter's configuration says, against its tensors and the base's modules."""

import math
import re
from collections.abc import Iterable

from peft.utils.other import get_pattern_key

from QEfficient.testing.adapter_files import EMBEDDING, PREFIX, AdapterFiles
from QEfficient.testing.check import Check, Facts, Finding, failed, passed, skipped
from QEfficient.testing.report import Outcome
from QEfficient.testing.text import counted, listed

_MOST_SCALING = 64.0
_ABSURD_SCALING = 1000.0


def _lora_modules(files: AdapterFiles) -> list[str]:
    found = {
        re.sub(r"\.lora_(A|embedding_A)(\.weight)?$", "", k)
        for k in files.tensors
        if re.search(r"lora_(embedding_)?A", k)
    }
    return sorted(m.removeprefix(PREFIX) for m in found)


def scalings(files: AdapterFiles) -> dict[str, float]:
    """Return what PEFT multiplies each LoRA module's output by."""
    config = files.config
    ranks: dict[str, int] = getattr(config, "rank_pattern", None) or {}
    alphas: dict[str, float] = getattr(config, "alpha_pattern", None) or {}
    found = {}
    for module in _lora_modules(files):
        rank = ranks.get(get_pattern_key(list(ranks), module), config.r)
        alpha = alphas.get(get_pattern_key(list(alphas), module), config.lora_alpha)
        root = math.sqrt(rank) if getattr(config, "use_rslora", False) else rank
        found[module] = alpha / root
    return found


def _ask_scaling(files: AdapterFiles, subject: str) -> Finding:
    if not hasattr(files.config, "lora_alpha") or not hasattr(files.config, "r"):
        return skipped(f"{files.method} has no lora_alpha.")
    found = scalings(files)
    if not found:
        return skipped("No module has LoRA factors.")
    module, worst = max(found.items(), key=lambda item: math.inf if not math.isfinite(item[1]) else abs(item[1]))
    facts: Facts = {"smallest": min(found.values()), "largest": max(found.values()), "r": files.config.r}
    where = f"lora_alpha {files.config.lora_alpha}, r {files.config.r} at {module}"
    if any(not math.isfinite(v) or v == 0 for v in found.values()):
        return Finding(
            Outcome.FAIL, f"The adapter is multiplied by zero or infinity ({where}): it does nothing.", worst, facts
        )
    if abs(worst) > _ABSURD_SCALING:
        text = f"The adapter is multiplied by {worst:g} ({where}): no training gives that. Restore lora_alpha."
        return Finding(Outcome.FAIL, text, abs(worst), facts)
    if abs(worst) > _MOST_SCALING or min(found.values()) < 0:
        text = f"The adapter is multiplied by {worst:g} ({where}), beyond what is usual. Was lora_alpha or use_rslora edited?"
        return Finding(Outcome.WARN, text, abs(worst), facts)
    return Finding(Outcome.PASS, f"The adapter is multiplied by {worst:g} at most ({where}).", abs(worst), facts)


def _ask_patterns(files: AdapterFiles, subject: str) -> Finding:
    modules = _base_modules(files)
    idle = []
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(files.config, field, None) or {}:
            if not any(get_pattern_key([key], module) == key and _matches(key, module) for module in modules):
                idle.append(f"{field} {key!r}")
    if idle:
        text = f"{listed(idle)} match no module of the base, so PEFT ignores them. Correct the names."
        return Finding(Outcome.WARN, text, len(idle))
    return passed("Every rank and alpha pattern matches a module, or there are none.", 0)


def _matches(key: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({key.removeprefix('^')})$", module) is not None


def _ask_targets(files: AdapterFiles, subject: str) -> Finding:
    modules = _base_modules(files)
    targets = getattr(files.config, "target_modules", None)
    named = [t for t in targets if not _names(t, modules)] if isinstance(targets, list | set | tuple) else []
    saved = [m for m in getattr(files.config, "modules_to_save", None) or [] if not _names(m, modules)]
    if named or saved:
        text = (
            f"target_modules or modules_to_save name {listed(sorted([*named, *saved]))}, which this base does not have"
        )
        return Finding(
            Outcome.WARN,
            f"{text}; PEFT skips them without a word. Is this the base it was trained on?",
            len(named) + len(saved),
        )
    reached, layers = _layers(files.modules()), _layers(modules)
    restricted = getattr(files.config, "layers_to_transform", None) is not None
    left = sorted(layers - reached)
    facts: Facts = {"layers": len(layers), "adapted layers": len(reached & layers)}
    if reached and left and not restricted and not isinstance(targets, str):
        text = f"{len(left)} of {len(layers)} layers have no adapted module (first: layer {left[0]}), though the configuration names no layers"
        return Finding(Outcome.WARN, f"{text}. Check target_modules.", len(left), facts)
    return passed("Every name of the configuration is a module of this base.", 0, facts)


def _names(target: str, modules: Iterable[str]) -> bool:
    return target == "all-linear" or any(m == target or m.endswith(f".{target}") for m in modules)


def _layers(modules: Iterable[str]) -> set[int]:
    return {int(found.group(1)) for m in modules if (found := re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", m))}


def _base_modules(files: AdapterFiles) -> set[str]:
    found: set[str] = set()
    for key in files.optional:
        parts = key.removeprefix(PREFIX).split(".")  # a parameter, experts stacked into one, may be adapted as well
        found |= {".".join(parts[:i]) for i in range(1, len(parts) + 1)}
    return found


def _ask_own_weights(files: AdapterFiles, subject: str) -> Finding:
    own = sorted(k for k in set(files.tensors) & set(files.optional) - set(files.expected) if ".base_layer." not in k)
    if not own:
        return passed("The file holds no tensor of the base itself.", 0)
    others = [k for k in own if not EMBEDDING.search(k)]
    if others:
        text = f"{counted(len(others), 'tensor')} of the file are the base's own, first {others[0]}: loading overwrites the base for every other adapter"
        return failed(
            f"{text}. Was modules_to_save or bias lost from the configuration? Restore it.",
            len(others),
            {"own": listed(others, 8)},
        )
    text = f"The file carries the base's {listed(own)}, which loading overwrites for every other adapter too"
    return Finding(Outcome.WARN, f"{text}. List it in modules_to_save, or save without embeddings.", len(own))


def _ask_task(files: AdapterFiles, subject: str) -> Finding:
    task = getattr(files.config.task_type, "value", files.config.task_type)
    if task in (None, "", "CAUSAL_LM"):
        return passed("It is an adapter of a causal language model." if task else "It records no task.")
    return failed(
        f"It was trained for {task}, not CAUSAL_LM: its head is not the base's. Load it with the model class of that task."
    )


CHECKS: tuple[Check[AdapterFiles], ...] = (
    Check(
        "targets",
        "Configuration names modules of this base",
        "PEFT complains only if no name matches at all; a misspelt one among several is skipped.",
        _ask_targets,
        tolerance=0,
        unit="names or layers",
    ),
    Check(
        "patterns",
        "Patterns match modules",
        "A rank_pattern or alpha_pattern that matches nothing has no effect and gives no warning.",
        _ask_patterns,
        tolerance=0,
        unit="patterns",
    ),
    Check(
        "scaling",
        "Scaling makes sense",
        "alpha / r (rsLoRA: alpha / √r) is a Python number beside the tensors, so an edit goes unnoticed; 64 is twice the largest that common recipes give.",
        _ask_scaling,
        tolerance=_MOST_SCALING,
        unit="scaling",
    ),
    Check(
        "own_weights",
        "Leaves the base's weights alone",
        "PEFT loads whatever name matches: a base tensor in the file replaces the base's, also when the adapter is disabled.",
        _ask_own_weights,
        tolerance=0,
        unit="base tensors",
    ),
    Check(
        "task", "Made for a causal LM", "An adapter of a classifier loads on a causal LM and gives nonsense.", _ask_task
    ),
)
"""Asked of each adapter, in this order."""
