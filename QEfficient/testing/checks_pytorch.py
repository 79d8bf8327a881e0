# SPDX-License-Identifier: BSD-3-Clause
"""Checks of the adapted model in PyTorch: does the adapter work at all, before anything is exported."""

import numpy as np

from QEfficient.contract import BASE
from QEfficient.testing import checks_lifecycle, checks_use
from QEfficient.testing.check import Check, Finding, failed, passed
from QEfficient.testing.compare import FLOAT32_NOISE, Difference, Logits, difference, joined
from QEfficient.testing.reference import Reference
from QEfficient.testing.report import Outcome, Series
from QEfficient.testing.text import number

_DISABLED_TOLERANCE = 1e-6


def _ask_finite(reference: Reference, subject: str) -> Finding:
    logits = reference.workload_logits(subject)
    bad = sum(int((~np.isfinite(rows)).any(axis=1).sum()) for rows in logits)
    positions = sum(len(rows) for rows in logits)
    if bad:
        text = f"{bad} of {positions} positions have logits that are NaN or infinite."
        return failed(f"{text} Look for damaged weights, or for a model that needs another precision.", bad)
    return passed(f"The logits of all {positions} positions are finite.", 0)


def _ask_effect(reference: Reference, subject: str) -> Finding:
    change = _from_base(reference, reference.workload_logits(subject))
    series = (Series("adapter's effect", change.labels, tuple(change.errors.tolist())),)
    if not np.isfinite(change.error):
        return Finding(Outcome.FAIL, "With the adapter the logits are not finite.", change.error, series=series)
    if change.error <= FLOAT32_NOISE:
        text = (
            f"With the adapter the logits are those of the base (they move by {number(change.error)} of their range)."
        )
        text += " It is untrained, all zero, or its tensors reached no module."
        return Finding(Outcome.FAIL, text, change.error, series=series)
    text = f"The adapter moves the logits by up to {number(change.error)} of their range, most at {change.labels[change.worst]}."
    return Finding(Outcome.PASS, text, change.error, series=series)


def _ask_disabled(reference: Reference, subject: str) -> Finding:
    reference.workload_logits(subject)  # so that the adapter has been active before it is disabled
    rest = _from_base(reference, [reference.logits(BASE, row) for row in reference.workload.rows])
    if rest.error <= _DISABLED_TOLERANCE:
        return passed("With the adapter disabled, the model is the base.", rest.error)
    if why := checks_lifecycle.known("disabled", reference, subject):
        text = f"With the adapter disabled, the logits differ from the base by {number(rest.error)} of their range"
        return Finding(Outcome.WARN, f"{text}. PEFT's own limit: {why}.", rest.error)
    text = f"With the adapter disabled, the logits differ from the base by {number(rest.error)} of their range."
    return failed(f"{text} The adapter changes the base's own weights, or leaves something behind.", rest.error)


def _from_base(reference: Reference, logits: list[Logits]) -> Difference:
    """Return how far logits of the workload are from those of the untouched base."""
    rows = enumerate(zip(logits, reference.untouched, strict=True))
    return joined(
        [difference([f"row {i}, position {p}" for p in range(len(a))], a, b, distribution=False) for i, (a, b) in rows]
    )


CHECKS: tuple[Check[Reference], ...] = (
    Check(
        "finite",
        "Logits are finite",
        "What is not finite in PyTorch cannot be compared with anything.",
        _ask_finite,
        tolerance=0,
        unit="positions not finite",
        of_base=True,
    ),
    Check(
        "effect",
        "Adapter has an effect",
        "Below 1e-05 of the logits' range a change cannot be told from float32 rounding.",
        _ask_effect,
        tolerance=FLOAT32_NOISE,
        unit="of range moved",
        at_least=True,
    ),
    Check(
        "disabled",
        "Disabled adapter is the base",
        "The same operations on the same weights; 1e-06 of the range leaves room for another order of additions.",
        _ask_disabled,
        tolerance=_DISABLED_TOLERANCE,
        unit="of range, disabled",
    ),
    *checks_use.CHECKS,
    *checks_lifecycle.CHECKS,
)
"""Asked of each adapter, and of the base where it applies."""
