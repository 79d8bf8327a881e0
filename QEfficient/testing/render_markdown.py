# SPDX-License-Identifier: BSD-3-Clause
"""The report as Markdown for a pull request: verdict, reasons, matrix, speed."""

from QEfficient.testing.report import CheckResult, Outcome, Report, Stage
from QEfficient.testing.text import METRICS, NOTHING, judged, listed, number, ratio, times

_SIGNS = {Outcome.PASS: "✅", Outcome.FAIL: "❌", Outcome.WARN: "⚠️", Outcome.SKIP: NOTHING}
_MOST_REASONS = 20
_MOST_ROWS = 50


def render(report: Report) -> str:
    """Return the report as Markdown."""
    parts = [f"### {_SIGNS[report.verdict]} {_text(report.summary())}", *_reasons(report), *_matrix(report)]
    if any(m.metric in METRICS for m in report.measurements):
        parts += _speed(report)
    versions = ", ".join(f"{k} {v}" for k, v in report.environment.versions.items())
    parts += ["", f"<sub>`{report.command}` · {report.seconds:.0f} s · {versions}</sub>", ""]
    return "\n".join(parts)


def _reasons(report: Report) -> list[str]:
    lines: list[str] = []
    findings = report.findings()
    for first, *others in findings[:_MOST_REASONS]:
        also = f" <br>also: {listed([f'`{r.name}`' for r in others], 4)}" if others else ""
        numbers = f" ({judged(first)})" if judged(first) else ""
        lines += [
            "",
            f"- {_SIGNS[first.outcome]} **{_text(first.subject)}** · `{first.name}`{numbers}: {_text(first.message)}{also}",
        ]
    if len(findings) > _MOST_REASONS:
        lines += ["", f"… and {len(findings) - _MOST_REASONS} more, in the report."]
    return lines


def _matrix(report: Report) -> list[str]:
    stages = [s for s in Stage if any(r.stage is s for r in report.results)]
    subjects = sorted(report.subjects, key=lambda s: report.verdict_of(s.name) is not Outcome.FAIL)
    lines = ["", f"| | {' | '.join(s.value for s in stages)} |", f"|---|{'---|' * len(stages)}"]
    for subject in subjects[:_MOST_ROWS]:
        results = [r for r in report.results if r.subject == subject.name]
        cells = [_cell([r for r in results if r.stage is stage]) for stage in stages]
        lines.append(f"| {_text(subject.name)} | {' | '.join(cells)} |")
    if len(subjects) > _MOST_ROWS:
        lines += ["", f"… and {len(subjects) - _MOST_ROWS} more adapters."]
    return lines


def _cell(results: list[CheckResult]) -> str:
    ran = [r for r in results if r.outcome is not Outcome.SKIP]
    if not ran:
        return _SIGNS[Outcome.SKIP]
    worst = next(o for o in (Outcome.FAIL, Outcome.WARN, Outcome.PASS) if any(r.outcome is o for r in ran))
    return f"{_SIGNS[worst]} {sum(r.outcome is not Outcome.FAIL for r in ran)}/{len(ran)}"


def _speed(report: Report) -> list[str]:
    subject = report.adapters[0].name if report.adapters else report.base.name
    lines = ["", f"| {_text(subject)} | PyTorch + PEFT | program | |", "|---|---:|---:|---:|"]
    for metric, (title, unit, more) in METRICS.items():
        values = [report.value(engine, subject, metric) for engine in ("pytorch", "program")]
        if any(v is not None for v in values):
            cells = " | ".join(number(v, unit) for v in values)
            lines.append(f"| {title} | {cells} | {times(ratio(values[0], values[1], more))} |")
    return lines


def _text(text: str) -> str:
    """Keep a message from becoming markup."""
    for sign in "\\`*_<>|":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("\n", " ")
