# SPDX-License-Identifier: BSD-3-Clause
"""Budgets: what was measured, held against what the user asked for. Without budgets nothing is judged."""

from collections.abc import Callable
from dataclasses import dataclass

from QEfficient.contract import BASE
from QEfficient.errors import ConfigError
from QEfficient.testing.check import Check, Finding, skipped
from QEfficient.testing.report import Measurement, Outcome
from QEfficient.testing.text import TIMES, number

_DECODE = "decode_tokens_per_second"
Found = dict[tuple[str, str], float]


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
        why = "Asked for with --min-speedup; a ratio within one run, so that the machine's load hits both sides."
        title = "Decode speed against PyTorch"
        found.append(
            Check("speedup", title, why, _ask_speedup(budgets.min_speedup), budgets.min_speedup, TIMES, True, True)
        )
    if budgets.max_overhead is not None:
        why = "Asked for with --max-overhead; time for each token with the adapter against the base, within one run."
        title = "Cost of the adapter"
        found.append(
            Check("overhead", title, why, _ask_overhead(budgets.max_overhead), budgets.max_overhead, "of base")
        )
    return tuple(found)


def _ask_speedup(least: float) -> Callable[[list[Measurement], str], Finding]:
    def ask(measurements: list[Measurement], subject: str) -> Finding:
        found = _decode(measurements)
        if ("program", subject) not in found:
            return skipped("Not measured: the time allowed went to the adapters before this one.")
        gain = found["program", subject] / found["pytorch", subject]
        outcome = Outcome.PASS if gain >= least else Outcome.FAIL
        return Finding(outcome, f"The program decodes {number(gain)} times as fast as PyTorch + PEFT.", gain)

    return ask


def _ask_overhead(most: float) -> Callable[[list[Measurement], str], Finding]:
    def ask(measurements: list[Measurement], subject: str) -> Finding:
        found = _decode(measurements)
        if ("program", subject) not in found:
            return skipped("Not measured: the time allowed went to the adapters before this one.")
        cost = found["program", BASE] / found["program", subject] - 1
        outcome = Outcome.PASS if cost <= most else Outcome.FAIL
        return Finding(
            outcome, f"With the adapter a token takes {number(100 * cost)} % longer than with the base.", cost
        )

    return ask


def _decode(measurements: list[Measurement]) -> Found:
    return {(m.engine, m.subject): m.value for m in measurements if m.metric == _DECODE}
