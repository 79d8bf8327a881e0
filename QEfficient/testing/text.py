# SPDX-License-Identifier: BSD-3-Clause
"""Numbers as people read them; used by the renderings and by the checks' messages."""

import math

from QEfficient.testing.report import CheckResult, Measurement

NOTHING = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
MARKS = {"pass": "✓", "fail": "✗", "warn": "!", "skip": NOTHING}
"""One character for each outcome."""

METRICS = {
    "load_seconds": ("Load", "s", False),
    "prefill_tokens_per_second": ("Prefill", "tok/s", True),
    "first_token_ms": ("First token", "ms", False),
    "decode_tokens_per_second": ("Decode", "tok/s", True),
    "token_latency_p50_ms": ("Token latency, median", "ms", False),
    "token_latency_p90_ms": ("Token latency, 90 %", "ms", False),
    "token_latency_p99_ms": ("Token latency, 99 %", "ms", False),
    "switch_ms": ("Switch and token", "ms", False),
    "throughput_2_tokens_per_second": ("Decode, 2 rows", "tok/s", True),
    "throughput_4_tokens_per_second": ("Decode, 4 rows", "tok/s", True),
    "throughput_8_tokens_per_second": ("Decode, 8 rows", "tok/s", True),
}
"""Title, unit and whether more is better, of each metric that has a value for both engines."""

SHARES = {
    "decode_share_of_floor": "Decode, of memory bandwidth",
    "prefill_share_of_floor": "Prefill, of peak arithmetic",
}
"""Title of each share of what the machine can do at best, measured in the same run."""

PARTS = {"weights": "Weights", "adapters": "Adapters", "cache": "KV cache", "rest": "Rest"}
"""Title of each part of the memory; the metric is ``memory_bytes.<part>``."""


def number(value: float | None, unit: str = "") -> str:
    """Return about three significant digits: ``1.23e-06``, ``0.0412``, ``1,234``."""
    if value is None:
        return NOTHING
    if unit == "bytes":
        return size(value)
    if not math.isfinite(value):
        text = "not finite"
    elif value == 0 or 100 <= abs(value) < 1e7:
        text = f"{value:,.0f}"
    elif not 1e-3 <= abs(value) < 1e7:
        mantissa, exponent = f"{value:.1e}".split("e")
        text = f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    else:
        text = f"{value:.3g}"
    return f"{text} {unit}" if unit else text


def size(value: float) -> str:
    """Return bytes in the unit that fits: ``"51 kB"``."""
    for unit in ("B", "kB", "MB"):
        if abs(value) < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def ratio(pytorch: float | None, program: float | None, more_is_better: bool) -> float | None:
    """Return how many times better the program is than PyTorch, or None if that cannot be said."""
    if not pytorch or not program:
        return None
    return program / pytorch if more_is_better else pytorch / program


def times(gain: float | None) -> str:
    """Return a ratio as people write it: two and a half times."""
    return f"{gain:.2f} {TIMES}" if gain else NOTHING


def judged(result: CheckResult) -> str:
    """Return what was measured and what it was held against: ``"2.1e-06 of 1e-04"``."""
    if result.measured is None:
        return ""
    if result.tolerance is None:
        return number(result.measured, result.unit)
    word = "needs at least" if result.at_least else "allowed"
    return f"{number(result.measured, result.unit)} ({word} {number(result.tolerance)})"


def counted(count: int, noun: str) -> str:
    """Return ``"1 tensor"``, ``"2 tensors"``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(names: list[str], limit: int = 3) -> str:
    """Return the first names and how many more there are."""
    head = ", ".join(names[:limit])
    return f"{head} and {len(names) - limit} more" if len(names) > limit else head


def percent(found: Measurement) -> str:
    """Return a share and its interval: ``12.1 % (10.4 to 13.9)``."""
    value, low, high = (100 * (v if v is not None else found.value) for v in (found.value, found.low, found.high))
    return f"{value:.1f} % ({low:.1f} to {high:.1f})"
