# SPDX-License-Identifier: BSD-3-Clause
"""Checks of the numbers in an adapter's tensors."""

import re
from collections import defaultdict

import numpy as np
import xxhash

from QEfficient.testing.adapter_files import AdapterFiles, is_float, leaf_of, module_of
from QEfficient.testing.check import Check, Facts, Finding, failed, passed, skipped
from QEfficient.testing.report import Outcome
from QEfficient.testing.text import counted, listed

_RMS_OUTLIER = 100.0
_VALUE_OUTLIER = 1000.0
_SMALLEST = float(np.finfo(np.float16).smallest_subnormal)
"""One step of training moves a factor by about its learning rate; what float16 cannot hold is none."""
_FACTORS = re.compile(
    r"\.(?:(?:gra|de)?lora_(?:A|B|E|embedding_A|embedding_B)|hira_[AB]|hada_w[12](?:_[ab])?|lokr_w[12](?:_[ab])?|vera_lambda_[bd]"
    r"|b?oft_R|miss_block|(?:fourierft|waveft)_spectrum|c3a_kernel|shira_weight|ia3_l|trainable_tokens_delta)\b"
)
"""Tensors that leave a module as it is when they are neutral: one for IA3, zero for the others."""


def _ask_finite(files: AdapterFiles, subject: str) -> Finding:
    floats = {key: t for key, t in files.tensors.items() if is_float(t) and t.size}
    largest_of = {key: float(np.abs(t).max()) for key, t in floats.items()}
    bad = {key: int((~np.isfinite(floats[key])).sum()) for key, v in largest_of.items() if not np.isfinite(v)}
    if bad:
        first = next(iter(bad))
        text = f"{counted(len(bad), 'tensor')} hold NaN or infinity, first {first} ({bad[first]} of {floats[first].size} values)."
        return failed(f"{text} Training diverged or the file is damaged; go back to an earlier checkpoint.", len(bad))
    key, largest = max(largest_of.items(), key=lambda item: item[1], default=("", 0.0))
    if largest > float(np.finfo(np.float16).max):
        text = f"The largest value is {largest:.3g} ({key}), more than float16 can hold; it becomes infinite in half precision."
        return Finding(Outcome.WARN, text, 0, {"largest value": largest})
    return passed("Every value of every tensor is finite.", 0, {"largest value": largest})


def _ask_effect(files: AdapterFiles, subject: str) -> Finding:
    factors = {key: t for key, t in files.tensors.items() if _FACTORS.search(key)}
    if not factors:
        return skipped(f"{files.method} has no factor that must not be neutral; the PyTorch stage measures its effect.")
    dead = sorted(key for key, t in factors.items() if _largest(t - (1 if "ia3_l" in key else 0)) < _SMALLEST)
    modules, still = {module_of(k) for k in factors}, {module_of(k) for k in dead}
    rest = sorted(set(files.tensors) - {k for k in files.tensors if module_of(k) in still and _FACTORS.search(k)})
    facts: Facts = {"neutral": listed(dead, 8)} if dead else {}
    if not dead:
        return passed(f"None of the {len(factors)} factors is all {'one' if files.method == 'IA3' else 'zero'}.", 0.0)
    kind = f"{leaf_of(dead[0])} tensors are {'one' if 'ia3_l' in dead[0] else 'zero'}"
    if still == modules and not rest:
        text = f"All {len(dead)} {kind}: the adapter does nothing. It was saved before it was trained."
        return failed(text, 1.0, facts)
    text = f"{len(dead)} of {len(factors)} {kind}, first {dead[0]}: these modules are not adapted."
    return Finding(Outcome.WARN, text, len(still) / len(modules), facts)


def _largest(tensor: np.ndarray) -> float:
    return max(float(tensor.max()), -float(tensor.min())) if tensor.size else 0.0


def _ask_outliers(files: AdapterFiles, subject: str) -> Finding:
    kinds: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    for key, t in files.tensors.items():
        if is_float(t) and t.size and np.any(t):
            flat = t.reshape(-1)
            kinds[leaf_of(key)][key] = float(np.sqrt(np.dot(flat, flat) / t.size)), float(np.abs(flat).max())
    found: list[tuple[float, str, str]] = []
    for sizes in kinds.values():
        middle = float(np.median([rms for rms, _ in sizes.values()]))
        if len(sizes) < 4 or not np.isfinite(middle) or not middle:
            continue
        for key, (rms, largest) in sizes.items():
            if rms > _RMS_OUTLIER * middle:
                found.append((rms / middle, key, "values"))
            elif largest > _VALUE_OUTLIER * middle:
                found.append((largest / middle, key, "one value"))
    if not found:
        return passed("No tensor is far larger than the others of its kind.", 0)
    factor, key, what = max(found)
    text = f"{key}: {what} {factor:.0f} times as large as usual in this adapter's {leaf_of(key)} tensors"
    return Finding(
        Outcome.WARN, f"{text}. A damaged file or a diverged training; compare with an earlier checkpoint.", len(found)
    )


def _ask_repeated(files: AdapterFiles, subject: str) -> Finding:
    prints: dict[str, dict[str, str]] = defaultdict(dict)
    for key, t in files.tensors.items():
        if is_float(t) and t.size > 8 and np.ptp(t):
            prints[module_of(key)][leaf_of(key)] = xxhash.xxh3_64_hexdigest(np.ascontiguousarray(t).tobytes())
    owners: dict[tuple[tuple[str, str], ...], list[str]] = defaultdict(list)
    for module, tensors in prints.items():
        owners[tuple(sorted(tensors.items()))].append(module)
    same = [modules for modules in owners.values() if len(modules) > 1]
    if not same:
        return passed("No two modules have the same tensors.", 0)
    count = sum(len(m) - 1 for m in same)
    text = f"{counted(count, 'module')} have exactly another's tensors, first {same[0][1]} those of {same[0][0]}"
    return failed(f"{text}. Training never gives equal tensors: a conversion wrote one module's over another's.", count)


CHECKS: tuple[Check[AdapterFiles], ...] = (
    Check(
        "finite",
        "Values are finite",
        "One NaN makes every output NaN, and PEFT loads it without a word; beyond 65,504 float16 overflows.",
        _ask_finite,
        tolerance=0,
        unit="damaged tensors",
    ),
    Check(
        "effect",
        "Tensors are not all neutral",
        "LoRA starts with lora_B = 0 (IA3 with ones), so an untrained adapter changes nothing; at least one must have moved, by more than float16's smallest number, 6e-08.",
        _ask_effect,
        unit="of modules neutral",
    ),
    Check(
        "outliers",
        "No tensor out of proportion",
        "Trained tensors of one kind were seen to differ by up to 10 times; 100 times (one value: 1,000 times) is damage.",
        _ask_outliers,
        tolerance=0,
        unit="tensors",
    ),
    Check(
        "repeated",
        "Modules have tensors of their own",
        "Noise of training makes every module's tensors different; equal ones have been copied.",
        _ask_repeated,
        tolerance=0,
        unit="modules",
    ),
)
"""Asked of each adapter, in this order."""
