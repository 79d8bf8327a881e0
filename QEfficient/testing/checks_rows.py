# SPDX-License-Identifier: BSD-3-Clause
"""Checks inside a LoRA factor: what training leaves nowhere, a conversion or a damaged file does.

Only factors are looked at: other methods keep indices, sparse vectors and constants on purpose.
"""

import re

import numpy as np
from safetensors import safe_open

from QEfficient.testing.adapter_files import AdapterFiles
from QEfficient.testing.check import Check, Finding, passed, skipped
from QEfficient.testing.report import Outcome
from QEfficient.testing.text import counted

_FACTOR = re.compile(r"\.lora_(A|B)\.weight$")
_COARSE = re.compile(r"I|U|BOOL|F[48]")
"""Types of safetensors that hold a trained factor only roughly."""
_SMALLEST = 8
_DEPENDENT = 1e-9
"""Smallest eigenvalue of the products of a random start's rows, each of length 1: float16's rounding alone leaves 1e-7."""


def _ask_rows(files: AdapterFiles, subject: str) -> Finding:
    factors = {k: t for k, t in files.tensors.items() if _FACTOR.search(k) and t.ndim == 2}
    if not factors:
        return skipped("It has no LoRA factors.")
    types = _types(files, list(factors))
    found = [
        (k, what)
        for k, tensor in sorted(factors.items())
        if (what := types.get(k) or _wrong(tensor) or ("lora_A" in k and _dependent(tensor)))
    ]
    if not found:
        return passed(f"The rows of all {len(factors)} factors are numbers of their own.", 0)
    key, what = found[0]
    text = f"{key} {what}; so it is in {counted(len(found), 'factor')} of {len(factors)}"
    return Finding(Outcome.WARN, f"{text}. Training gives no such tensor: compare with the checkpoint.", len(found))


def _types(files: AdapterFiles, keys: list[str]) -> dict[str, str]:
    """Say which tensors the file holds as whole numbers or in 8 bits and less; what was read of it has been made float32."""
    with safe_open(str(files.path / "adapter_model.safetensors"), framework="np") as f:
        types = {k: str(f.get_slice(k).get_dtype()) for k in set(f.keys()) & set(keys)}
    return {k: f"is saved as {t}" for k, t in types.items() if _COARSE.match(t)}


def _wrong(tensor: np.ndarray) -> str | None:
    """Say what is wrong with a factor ``(out, in)``; None if nothing is, or if it is all zero, which has a check of its own."""
    rows = np.asarray(tensor, dtype=np.float32)
    if tensor.size < _SMALLEST or not rows.any():
        return None
    empty = int((~rows.any(axis=1)).sum())
    if empty:
        return f"has {counted(empty, 'row')} of {len(rows)} that are all zero"
    # By their bytes, which are fewer to compare than to sort; adding 0 makes -0 the same.
    if rows.shape[1] > 1 and (copies := len(rows) - len({row.tobytes() for row in rows + np.float32(0)})):
        return f"has {counted(copies, 'row')} of {len(rows)} that are copies of others"
    return None


def _dependent(tensor: np.ndarray) -> str | None:
    """Say that rows of ``lora_A (r, in)`` are combinations of others; they start random, so training does not make them so."""
    rows = np.asarray(tensor, dtype=np.float32)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not 1 < len(rows) <= rows.shape[1] or not np.isfinite(lengths).all() or not lengths.all():
        return None
    unit = (rows / lengths).astype(np.float64)
    free = int((np.linalg.eigvalsh(unit @ unit.T) > _DEPENDENT).sum())
    return f"has {len(rows)} rows, of which only {free} are independent" if free < len(rows) else None


CHECKS: tuple[Check[AdapterFiles], ...] = (
    Check(
        "rows",
        "Rows of a factor are its own",
        "Noise of training makes every row of lora_A and lora_B different and none exactly zero; a conversion that fills, repeats or rounds leaves such rows.",
        _ask_rows,
        tolerance=0,
        unit="factors",
    ),
)
"""Asked of each adapter."""
