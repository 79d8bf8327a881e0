# SPDX-License-Identifier: BSD-3-Clause
"""What a check is: a named question with a tolerance and its reason, asked about one subject.

A check is a :class:`Check` in a tuple; ``run`` asks each of them in order. To add one, write a function that takes the
context of its stage and a subject's name and returns a :class:`Finding`, and name it in the stage's tuple.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from QEfficient.testing.report import CheckResult, Outcome, Series, Stage

C = TypeVar("C")
Facts = dict[str, str | float | int]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check's function found; the fields are those of ``CheckResult``."""

    outcome: Outcome
    message: str
    measured: float | None = None
    facts: Facts = field(default_factory=dict)
    series: tuple[Series, ...] = ()


@dataclass(frozen=True, slots=True)
class Check(Generic[C]):
    """One question.

    Attributes:
        name: Last part of the check's name; the stage comes in front.
        title: The same in words.
        reason: Why the tolerance is what it is, or why the question is asked.
        ask: Answers it, given the stage's context and a subject's name.
        tolerance: What the measured number is held against, if anything.
        unit: Unit of both.
        at_least: The measured number must reach the tolerance.
        of_base: The question is also asked about the base.
        of_adapters: The question is asked about adapters.
    """

    name: str
    title: str
    reason: str
    ask: Callable[[C, str], Finding]
    tolerance: float | None = None
    unit: str = ""
    at_least: bool = False
    of_base: bool = False
    of_adapters: bool = True

    def perform(self, stage: Stage, context: C, subject: str) -> CheckResult:
        """Ask the question; a check that cannot be carried out has not passed."""
        start = time.perf_counter()
        try:
            found = self.ask(context, subject)
        except Exception as e:  # noqa: BLE001, RUF100 -- one check must not take the others along
            text = f"The check could not be carried out: {type(e).__name__}: {str(e).strip() or 'no message'}"
            found = Finding(Outcome.FAIL, text.splitlines()[0])
        seconds = time.perf_counter() - start
        return self.result(stage, subject, found.outcome, found.message, found, seconds)

    def result(
        self,
        stage: Stage,
        subject: str,
        outcome: Outcome,
        message: str,
        found: Finding | None = None,
        seconds: float = 0.0,
    ) -> CheckResult:
        """Return what was found, or a message alone, as a result of this check."""
        return CheckResult(
            name=f"{stage.value}.{self.name}",
            title=self.title,
            subject=subject,
            stage=stage,
            outcome=outcome,
            message=message,
            reason=self.reason,
            measured=found.measured if found else None,
            tolerance=None if outcome is Outcome.SKIP or found is None else self.tolerance,
            unit=self.unit,
            at_least=self.at_least,
            facts=found.facts if found else {},
            series=found.series if found else (),
            seconds=seconds,
        )


def passed(message: str, measured: float | None = None, facts: Facts | None = None) -> Finding:
    """Return a passing finding."""
    return Finding(Outcome.PASS, message, measured, facts or {})


def failed(message: str, measured: float | None = None, facts: Facts | None = None) -> Finding:
    """Return a failing finding."""
    return Finding(Outcome.FAIL, message, measured, facts or {})


def skipped(why: str) -> Finding:
    """Return the finding of a question that does not apply."""
    return Finding(Outcome.SKIP, why)
