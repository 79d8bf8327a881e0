# SPDX-License-Identifier: BSD-3-Clause
"""One report against an earlier one: what got worse beyond noise."""

from dataclasses import dataclass
from pathlib import Path

from QEfficient.errors import ArtifactError, ConfigError
from QEfficient.testing.check import Check, Facts, Finding, failed, passed
from QEfficient.testing.report import CheckResult, Outcome, Report
from QEfficient.testing.text import METRICS, listed, number

_ERROR_FACTOR = 10.0
_ERROR_FLOOR = 1e-5
_SPEED_LOSS = 0.15
_RANK = {Outcome.SKIP: 0, Outcome.PASS: 0, Outcome.WARN: 1, Outcome.FAIL: 2}


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that differs between two reports.

    Attributes:
        subject: The base or an adapter.
        what: Name of a check or of a metric.
        text: Before and after.
        worse: It is a regression.
    """

    subject: str
    what: str
    text: str
    worse: bool


def read_report(path: str | Path) -> Report:
    """Read a ``report.json``, or the one in a folder.

    Raises:
        ConfigError: There is no such file.
        ArtifactError: It is not a report of this version.
    """
    from QEfficient.testing import render_json

    file = Path(path) / "report.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ConfigError(f"report {str(path)!r} does not exist")
    try:
        return render_json.read(file.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError) as e:
        raise ArtifactError(f"{file} is not a report of this version: {type(e).__name__}: {e}") from e


def compare(before: Report, after: Report) -> list[Change]:
    """Return what differs, regressions first; noise is left out."""
    known, found = _by_name(before), _by_name(after)
    changes = [c for key in known if key in found for c in _check(known[key], found[key])]
    gone = [key for key in known if key not in found and known[key].outcome is not Outcome.SKIP]
    ran = {r.stage for r in after.results}
    changes += [Change(s, n, "was asked before, not now", True) for s, n in gone if known[s, n].stage in ran]
    changes += _speeds(before, after)
    return sorted(changes, key=lambda c: not c.worse)


def _by_name(report: Report) -> dict[tuple[str, str], CheckResult]:
    worst: dict[tuple[str, str], CheckResult] = {}
    for result in report.results:
        if result.stage.value != "baseline":
            key = (result.subject, result.name)
            if key not in worst or _RANK[result.outcome] > _RANK[worst[key].outcome]:
                worst[key] = result
    return worst


def _check(before: CheckResult, after: CheckResult) -> list[Change]:
    if before.outcome != after.outcome and Outcome.SKIP not in (before.outcome, after.outcome):
        worse = _RANK[after.outcome] > _RANK[before.outcome]
        text = f"{before.outcome.value} → {after.outcome.value}: {after.message}"
        return [Change(after.subject, after.name, text, worse)]
    if after.name == "adapter.files" and before.facts != after.facts:
        return [Change(after.subject, after.name, "the adapter's files have changed since", False)]
    a, b = before.measured, after.measured
    if a is None or b is None or not after.unit.startswith("of range") or after.at_least:
        return []
    if b > max(_ERROR_FACTOR * a, _ERROR_FLOOR):
        return [Change(after.subject, after.name, f"{number(a)} → {number(b)} {after.unit}", True)]
    return []


def _speeds(before: Report, after: Report) -> list[Change]:
    """Compare ratios of program and PyTorch, each within its own run, so that another machine's load does not count."""
    changes = []
    for subject in after.subjects:
        for metric, (title, _, more) in METRICS.items():
            pairs = [
                (r.value("pytorch", subject.name, metric), r.value("program", subject.name, metric))
                for r in (before, after)
            ]
            gains = [(p / t if more else t / p) for t, p in pairs if t and p]
            if len(gains) == 2 and "p99" not in metric and gains[1] < gains[0] * (1 - _SPEED_LOSS):
                changes.append(
                    Change(
                        subject.name,
                        metric,
                        f"{title}: {gains[0]:.2f} → {gains[1]:.2f} times PyTorch's",
                        metric.startswith("decode"),
                    )
                )
    return changes


def _ask_regressions(changes: list[Change], subject: str) -> Finding:
    ours = [c for c in changes if c.subject == subject]
    worse = [c for c in ours if c.worse]
    facts: Facts = {c.what: c.text for c in ours[:20]}
    if worse:
        text = f"Worse than in the baseline: {listed([f'{c.what} ({c.text})' for c in worse], 2)}."
        return failed(f"{text} If that is intended, make this report the new baseline.", len(worse), facts)
    if not ours:
        return passed("Nothing is worse than in the baseline.", 0)
    return passed(f"Nothing is worse than in the baseline; changed: {listed([c.what for c in ours])}.", 0, facts)


CHECKS: tuple[Check[list[Change]], ...] = (
    Check(
        "regressions",
        "No worse than the baseline",
        "Errors of rounding vary by less than 10 times and below 1e-05 of the range; the ratio of two speeds of one run by less than 15 %.",
        _ask_regressions,
        tolerance=0,
        unit="regressions",
        of_base=True,
    ),
)
"""Asked of the base and of each adapter if a baseline is given."""
