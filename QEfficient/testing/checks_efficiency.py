# SPDX-License-Identifier: BSD-3-Clause
"""Budgets: what was measured, held against what the user asked for. Without budgets nothing is judged."""

from collections.abc import Callable
from dataclasses import dataclass

from QEfficient.errors import ConfigError
from QEfficient.testing.check import Check, Facts, Finding, skipped
from QEfficient.testing.report import Measurement, Outcome, measured
from QEfficient.testing.text import TIMES, number

_NOT_MEASURED = "Not measured: the time allowed went to the adapters before this one."


@dataclass(frozen=True, slots=True)
class Budgets:
    """Limits of the ratios that are measured.

    Attributes:
        min_speedup: Least decode speed of the program, as a multiple of PyTorch's.
        max_overhead: Most that an adapter may slow down the program's decoding, as a share of the base's time.
    """

    min_speedup: float | None = None
    max_overhead: float | None = None


def parse_share(text: str, name: str) -> float:
    """Return ``"15%"`` or ``"0.15"`` as 0.15.

    Raises:
        ConfigError: It is neither.
    """
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if value < 0:
        raise ConfigError(f"{name} must be a share such as 15% or 0.15, not {text!r}")
    return value


def checks(budgets: Budgets) -> tuple[Check[list[Measurement]], ...]:
    """Return the checks that the budgets ask for."""
    found = []
    if budgets.min_speedup is not None:
        why = "Asked for with --min-speedup; judged by the 95 % interval of the ratio, turn by turn within one run; fails only where all of it is beyond the budget."
        title = "Decode speed against PyTorch"
        found.append(
            Check("speedup", title, why, _ask_speedup(budgets.min_speedup), budgets.min_speedup, TIMES, True, True)
        )
    if budgets.max_overhead is not None:
        why = "Asked for with --max-overhead; time for each token with the adapter against the base, in pairs of turns; fails only where all of the 95 % interval is beyond the budget."
        title = "Cost of the adapter"
        found.append(
            Check("overhead", title, why, _ask_overhead(budgets.max_overhead), budgets.max_overhead, "of base")
        )
    return tuple(found)


def _ask_speedup(least: float) -> Callable[[list[Measurement], str], Finding]:
    def ask(measurements: list[Measurement], subject: str) -> Finding:
        found = measured(measurements, "program", subject, "speedup")
        if found is None:
            return skipped(_NOT_MEASURED)
        text = f"The program decodes {number(found.value)} times as fast as PyTorch + PEFT"
        span = f"{number(found.low)} to {number(found.high)} times"
        return _judged(text, span, found, -least, -1)

    return ask


def _ask_overhead(most: float) -> Callable[[list[Measurement], str], Finding]:
    def ask(measurements: list[Measurement], subject: str) -> Finding:
        found = measured(measurements, "program", subject, "overhead")
        if found is None:
            return skipped(_NOT_MEASURED)
        low, high = (100 * (v or 0.0) for v in (found.low, found.high))
        text = f"With the adapter a token takes {number(100 * found.value)} % longer than with the base"
        return _judged(text, f"{number(low)} to {number(high)} %", found, most, 1)

    return ask


def _judged(text: str, span: str, found: Measurement, limit: float, sign: int) -> Finding:
    """Pass or fail only where the whole interval lies on one side of the limit; ``sign`` is -1 if more is better."""
    ends = sorted(sign * (v if v is not None else found.value) for v in (found.low, found.high))
    facts: Facts = {"95 % interval": span}
    if ends[1] <= limit:
        return Finding(Outcome.PASS, f"{text} ({span}).", found.value, facts)
    if ends[0] > limit:
        return Finding(Outcome.FAIL, f"{text} ({span}): all of the interval is beyond the budget.", found.value, facts)
    text = f"Inconclusive: {text[0].lower()}{text[1:]}, but anything of {span} explains what was measured"
    return Finding(Outcome.WARN, f"{text}. Measure on a quieter machine.", found.value, facts)
