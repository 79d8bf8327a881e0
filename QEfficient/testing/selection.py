# SPDX-License-Identifier: BSD-3-Clause
"""Which checks there are, which of them are asked, and asking them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib import metadata
from typing import Any

from QEfficient.contract import BASE
from QEfficient.errors import ConfigError
from QEfficient.options import suggest
from QEfficient.testing import (
    baseline,
    checks_adapter,
    checks_graph,
    checks_mixed,
    checks_pytorch,
    harness,
    precision,
    quality,
)
from QEfficient.testing.check import C, Check
from QEfficient.testing.report import CheckResult, Outcome, Stage

GROUP = "qefficient.checks"
"""Entry point group: each names an iterable of pairs of a stage (``"pytorch"``) and a :class:`Check`."""

Progress = Callable[[str, str], None]
"""Called with what is done (``"graph.prefill"``, ``"export"``) and for whom, before it is done."""


_OPEN = (Stage.ADAPTER, Stage.PYTORCH, Stage.GRAPH, Stage.PROGRAM)


def catalog() -> dict[Stage, tuple[Check[Any], ...]]:
    """Return every check by stage, those of installed packages behind our own.

    Raises:
        ConfigError: A package adds a check that cannot be used, or with a name that is taken.
    """
    found: dict[Stage, tuple[Check[Any], ...]] = {
        Stage.ADAPTER: (*checks_adapter.CHECKS, *checks_adapter.SET_CHECKS),
        Stage.PYTORCH: checks_pytorch.CHECKS,
        Stage.GRAPH: checks_graph.CHECKS,
        Stage.PROGRAM: (*checks_graph.CHECKS, *checks_mixed.CHECKS),
        Stage.QUALITY: (*quality.CHECKS, *precision.CHECKS, *harness.CHECKS),
        Stage.BASELINE: baseline.CHECKS,
    }
    for entry in metadata.entry_points(group=GROUP):
        for stage, check in _loaded(entry):
            if any(c.name == check.name for c in found[stage]):
                raise ConfigError(f"{entry.value} adds a check {check.name!r} to {stage}, which already has one")
            found[stage] += (check,)
    return found


def _loaded(entry: Any) -> list[tuple[Stage, Check[Any]]]:
    try:
        pairs = [(Stage(stage), check) for stage, check in entry.load()]
    except Exception as e:
        raise ConfigError(f"the checks of {entry.value} ({GROUP}) cannot be loaded: {type(e).__name__}: {e}") from e
    if any(stage not in _OPEN or not isinstance(check, Check) for stage, check in pairs):
        raise ConfigError(
            f"{entry.value} ({GROUP}) must give pairs of a stage (adapter, pytorch, graph, program) and a Check"
        )
    return pairs


@dataclass(frozen=True, slots=True)
class Selection:
    """Which checks are asked.

    Attributes:
        only: Patterns of names; empty for all.
        skip: Patterns of names that are reported as skipped, and why.
    """

    only: tuple[str, ...] = ()
    skip: Mapping[str, str] = field(default_factory=dict)

    def validate(self, names: Sequence[str]) -> None:
        """Refuse patterns that fit no check.

        Raises:
            ConfigError: With a suggestion.
        """
        for pattern in (*self.only, *self.skip):
            if not any(fnmatch(name, pattern) for name in names):
                raise ConfigError(f"no check is called {pattern!r}{suggest(pattern, names)}")

    def asked(self, name: str) -> bool:
        """Whether a check is part of this run, skipped or not."""
        return not self.only or any(fnmatch(name, pattern) for pattern in self.only)

    def reason(self, name: str) -> str | None:
        """Return why a check is skipped, or None."""
        return next((why for pattern, why in self.skip.items() if fnmatch(name, pattern)), None)


def perform(
    stage: Stage,
    checks: Sequence[Check[C]],
    context: C,
    subject: str,
    selection: Selection,
    progress: Progress = lambda what, subject: None,
) -> list[CheckResult]:
    """Ask the questions of one stage about one subject."""
    results = []
    for check in checks:
        name = f"{stage.value}.{check.name}"
        if not (check.of_base if subject == BASE else check.of_adapters) or not selection.asked(name):
            continue
        why = selection.reason(name)
        if why is not None:
            results.append(check.result(stage, subject, Outcome.SKIP, f"Skipped on request: {why}"))
            continue
        progress(name, subject)
        results.append(check.perform(stage, context, subject))
    return results
