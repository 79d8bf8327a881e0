# SPDX-License-Identifier: BSD-3-Clause
"""The report as text for a terminal of 80 columns: the verdict, the reasons, the matrix, the speed."""

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from QEfficient.testing.report import CheckResult, Outcome, Report, Stage, measured
from QEfficient.testing.text import MARKS, METRICS, NOTHING, PARTS, SHARES, listed, number, percent, ratio, size, times

_COLOUR = {Outcome.PASS: "green", Outcome.FAIL: "red", Outcome.WARN: "yellow", Outcome.SKIP: "bright_black"}
_MOST_REASONS = 8


def render(report: Report, width: int = 80) -> str:
    """Return the report as plain text."""
    console = Console(width=width, no_color=True, highlight=False, emoji=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(view(report))
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def view(report: Report) -> RenderableType:
    """Return the report as something that rich prints, in colour."""
    colour = _COLOUR[report.verdict]
    head = Text.assemble((f" {report.verdict.value.upper()} ", f"bold white on {colour}"), "  ", report.summary())
    parts: list[RenderableType] = [head, *_reasons(report), Text(), _matrix(report)]
    if any(m.metric in METRICS for m in report.measurements):
        parts += [Text(), _speed(report)]
    return Group(*parts)


def _reasons(report: Report) -> list[RenderableType]:
    """What failed, then what was noticed: for each subject the cause, and the names of what follows from it."""
    findings = report.findings()
    shown: list[RenderableType] = []
    for first, *others in findings[:_MOST_REASONS]:
        title = Text.assemble(
            (MARKS[first.outcome], f"bold {_COLOUR[first.outcome]}"),
            (f" {first.subject}", "bold"),
            f" · {first.stage.value} · {first.title}",
        )
        shown += [Text(), title, Padding(Text(first.message), (0, 0, 0, 2))]
        if others:
            names = listed([r.name for r in others], 4)
            shown.append(Padding(Text(f"also: {names}", style="bright_black"), (0, 0, 0, 2)))
    if len(findings) > _MOST_REASONS:
        shown += [Text(), Text(f"… and {len(findings) - _MOST_REASONS} more adapters, in the report.")]
    return shown


def _matrix(report: Report) -> Table:
    stages = [s for s in Stage if any(r.stage is s for r in report.results)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("checks passed", overflow="fold", max_width=28)
    for stage in stages:
        table.add_column(stage.value, justify="right")
    table.add_column("largest error", justify="right")
    for subject in report.subjects:
        results = [r for r in report.results if r.subject == subject.name]
        cells = [_cell([r for r in results if r.stage is stage]) for stage in stages]
        table.add_row(subject.name, *cells, number(_largest_error(results)))
    return table


def _cell(results: list[CheckResult]) -> Text:
    ran = [r for r in results if r.outcome is not Outcome.SKIP]
    if not ran:
        return Text(MARKS[Outcome.SKIP], style=_COLOUR[Outcome.SKIP])
    worst = next(o for o in (Outcome.FAIL, Outcome.WARN, Outcome.PASS) if any(r.outcome is o for r in ran))
    sound = sum(r.outcome is not Outcome.FAIL for r in ran)
    return Text(f"{MARKS[worst]} {sound}/{len(ran)}", style=_COLOUR[worst])


def _largest_error(results: list[CheckResult]) -> float | None:
    """Return the largest logits error of graph and program, relative to the range of the logits."""
    errors = [r.measured for r in results if r.unit == "of range" and r.measured is not None]
    return max(errors, default=None)


def _speed(report: Report) -> Table:
    subject = report.adapters[0].name if report.adapters else report.base.name
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"efficiency ({subject})", overflow="fold", max_width=34)
    for title in ("PyTorch", "program", "ratio"):
        table.add_column(title, justify="right")
    for metric, (title, unit, more_is_better) in METRICS.items():
        pytorch, program = (report.value(engine, subject, metric) for engine in ("pytorch", "program"))
        if pytorch is None and program is None:
            continue
        gain = ratio(pytorch, program, more_is_better)
        cells = (number(pytorch, unit), number(program, unit), times(gain))
        table.add_row(title, *cells)
    for metric, title in SHARES.items():
        shares = [report.value(engine, subject, metric) for engine in ("pytorch", "program")]
        if any(shares):
            table.add_row(title, *(number(100 * s, "%") if s else NOTHING for s in shares), "")
    cost = measured(report.measurements, "program", subject, "overhead")
    if cost is not None:
        table.add_row("Adapter's cost of a token", "", percent(cost), "")
    totals = [_memory(report, engine, subject) for engine in ("pytorch", "program")]
    if all(totals):
        table.add_row("Memory", size(totals[0]), size(totals[1]), times(totals[0] / totals[1]))
    return table


def _memory(report: Report, engine: str, subject: str) -> float:
    return sum(report.value(engine, subject, f"memory_bytes.{part}") or 0.0 for part in PARTS)
