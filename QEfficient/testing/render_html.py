# SPDX-License-Identifier: BSD-3-Clause
"""The report as one HTML file: no network, no script, light and dark, readable on a phone."""

import math
from dataclasses import dataclass
from typing import Any

import jinja2

from QEfficient.testing import text
from QEfficient.testing.report import CheckResult, Outcome, Report, Series, Stage, measured

_FLOOR = 1e-9
_SCENARIOS = ("prefill", "chunked", "decode", "ragged")


@dataclass(frozen=True, slots=True)
class Line:
    """One set of points of a plot: horizontal positions from 0 to 1, values, and the CSS class that colours it."""

    label: str
    style: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Plot:
    """Differences of one subject at every position, on a log scale.

    Attributes:
        subject: Whose.
        lines: What is drawn.
        bands: Label, start and end of each part of the horizontal axis.
        tolerance: Where the limit is drawn.
        low: Exponent of the lower end of the scale.
        high: Exponent of the upper end.
    """

    subject: str
    lines: tuple[Line, ...]
    bands: tuple[tuple[str, float, float], ...]
    tolerance: float
    low: int
    high: int


def render(report: Report) -> str:
    """Return the report as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("QEfficient.testing"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "number": text.number,
        "size": text.size,
        "judged": text.judged,
        "level": _level,
        "times": text.times,
    }
    anchors = {id(r): f"check-{i}" for i, r in enumerate(report.results)}
    return environment.get_template("report.html.j2").render(
        report=report,
        marks=text.MARKS,
        metrics=text.METRICS,
        parts=text.PARTS,
        ratio=text.ratio,
        results=_by_cell(report),
        columns=_columns(report),
        plots=_plots(report),
        measured=_measured_subjects(report),
        memory=memory(report),
        tiles=_tiles(report),
        curves=lambda subject: _curves(report, subject),
        **_spread(report),
        slug=lambda r: anchors[id(r)],
    )


def _plots(report: Report) -> list[Plot]:
    """Return the plot of every subject, those that failed before the others."""
    subjects = sorted(report.subjects, key=lambda s: report.verdict_of(s.name) is not Outcome.FAIL)
    return [p for s in subjects if (p := closeness(report, s.name)) is not None]


def closeness(report: Report, subject: str) -> Plot | None:
    """Collect the differences of a subject's graph and program at every position, or None if none were taken."""
    found = {(r.stage, r.name.split(".")[1]): r for r in report.results if r.subject == subject and r.series}
    lengths = {s: _length(found, s) for s in _SCENARIOS}
    bands, start = [], 0.0
    present = [s for s in _SCENARIOS if lengths[s]]
    if not present:
        return None
    for scenario in present:
        width = (2 + lengths[scenario]) / sum(2 + lengths[s] for s in present)
        bands.append((scenario, start, start + width))
        start += width
    lines = [
        _line(found, stage, series, label, style, bands)
        for stage, series, label, style in (
            (Stage.GRAPH, "adapter's effect", "what the adapter changes", "effect"),
            (Stage.GRAPH, "difference", "graph", "graph"),
            (Stage.PROGRAM, "difference", "program", "program"),
        )
    ]
    drawn = tuple(line for line in lines if line.y)
    values = [v for line in drawn for v in line.y if math.isfinite(v)]
    high = max(0, math.ceil(math.log10(max([*values, _FLOOR]))))
    low = min(-8, math.floor(math.log10(max(min(values, default=1e-6), _FLOOR))))
    tolerance = next(r.tolerance for (_, s), r in found.items() if s in present)
    return Plot(subject, drawn, tuple(bands), tolerance or 1e-4, low, high)


def _length(found: dict[tuple[Stage, str], CheckResult], scenario: str) -> int:
    sizes = [len(r.series[0].y) for (_, name), r in found.items() if name == scenario]
    return max(sizes, default=0)


def _line(
    found: dict[tuple[Stage, str], CheckResult],
    stage: Stage,
    series: str,
    label: str,
    style: str,
    bands: list[tuple[str, float, float]],
) -> Line:
    xs: list[float] = []
    ys: list[float] = []
    for scenario, begin, end in bands:
        result = found.get((stage, scenario))
        values = next((s.y for s in result.series if s.label == series), ()) if result else ()
        xs += [begin + (end - begin) * (i + 1.5) / (len(values) + 2) for i in range(len(values))]
        ys += values
    return Line(label, style, tuple(xs), tuple(ys))


def _level(value: float | None, low: int, high: int) -> float:
    """Return where a value stands on a log scale, 0 for 10**low and 1 for 10**high; what is not finite stands at the top."""
    if value is None or not math.isfinite(value):
        return 1.0
    return min(1.0, max(0.0, (math.log10(max(value, _FLOOR)) - low) / (high - low)))


def _columns(report: Report) -> list[tuple[str, list[CheckResult]]]:
    """Return the matrix's columns: for each stage one result of each of its checks, for names and titles."""
    columns = []
    for stage in Stage:
        found = [r for r in report.results if r.stage is stage]
        of_adapters = {r.name: r for r in found if r.subject != report.base.name}
        of_base = {r.name: r for r in found if r.name not in of_adapters}
        if found:
            columns.append((stage.value, [*of_base.values(), *of_adapters.values()]))
    return columns


def _curves(report: Report, subject: str) -> list[tuple[str, float, list[tuple[str, Series]]]]:
    """Return what is drawn beneath a subject's differences: title, limit, and the series of graph and program."""
    found = []
    for name, title in (
        ("distribution", "Divergence of the distribution, nats"),
        ("layers", "Keys and values, layer by layer"),
    ):
        results = [r for r in report.results if r.subject == subject and r.name.endswith(f".{name}") and r.series]
        lines = [(r.stage.value, r.series[0]) for r in results if any(r.series[0].y)]
        if lines:
            found.append((title, results[0].tolerance or 1e-4, lines[:2]))
    return found


def _spread(report: Report) -> dict[str, Any]:
    """Return latencies, shares of the machine's best, and the adapter's cost, of the first adapter."""
    subject = report.adapters[0].name if report.adapters else report.base.name
    latencies = [
        (engine, *(report.value(engine, subject, f"token_latency_p{p}_ms") for p in (50, 90, 99)))
        for engine in ("pytorch", "program")
    ]
    floors = []
    for metric, title in text.SHARES.items():
        shares = [(e, v) for e in ("pytorch", "program") if (v := report.value(e, subject, metric)) is not None]
        floors += [(title, shares)] if shares else []
    cost = measured(report.measurements, "program", subject, "overhead")
    return {
        "latencies": [one for one in latencies if None not in one],
        "floors": floors,
        "cost": text.percent(cost) if cost else "",
        "bandwidth": report.value("machine", "base", "bandwidth_bytes_per_second"),
        "peak": report.value("machine", "base", "peak_operations_per_second"),
    }


def _by_cell(report: Report) -> dict[tuple[str, str], CheckResult]:
    """Return the result that the matrix shows for a subject and a check: the worst, where several graphs were tested."""
    order = (Outcome.SKIP, Outcome.PASS, Outcome.WARN, Outcome.FAIL)
    cells: dict[tuple[str, str], CheckResult] = {}
    for result in report.results:
        before = cells.setdefault((result.subject, result.name), result)
        if order.index(result.outcome) > order.index(before.outcome):
            cells[result.subject, result.name] = result
    return cells


def _measured_subjects(report: Report) -> list[str]:
    found = {m.subject for m in report.measurements if m.metric in text.METRICS}
    return [s.name for s in (*report.adapters[:1], report.base, *report.adapters[1:]) if s.name in found]


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """Return the few numbers that people look for first: title, value, what it means."""
    tiles = []
    errors = [r for r in report.results if r.unit == "of range" and r.measured is not None]
    if errors:
        worst = max(
            errors, key=lambda r: r.measured if r.measured is not None and math.isfinite(r.measured) else math.inf
        )
        limit = text.number(worst.tolerance)
        tiles.append(("Largest difference", text.number(worst.measured), f"of the logits' range; {limit} is allowed"))
    tokens = [r for r in report.results if r.name.split(".")[1].startswith("greedy") and "tokens" in r.facts]
    if tokens:
        right = sum(int(r.facts["tokens"]) - int(r.measured or 0) for r in tokens)
        total = sum(int(r.facts["tokens"]) for r in tokens)
        tiles.append(("Generated tokens", f"{right:,}", f"of {total:,} are PyTorch's choice"))
    subject = report.adapters[0].name if report.adapters else report.base.name
    for metric in ("decode_tokens_per_second", "prefill_tokens_per_second"):
        title, _, more = text.METRICS[metric]
        gain = text.ratio(report.value("pytorch", subject, metric), report.value("program", subject, metric), more)
        if gain:
            tiles.append((f"{title} speed", text.times(gain), "that of PyTorch + PEFT, on this machine"))
    counts = len([r for r in report.results if r.outcome is not Outcome.SKIP])
    tiles.append(("Checks", f"{counts:,}", f"in {report.seconds:.0f} s"))
    return tiles


def memory(report: Report) -> dict[str, dict[str, float]]:
    """Return bytes by engine and part."""
    found: dict[str, dict[str, Any]] = {}
    for m in report.measurements:
        if m.metric.startswith("memory_bytes."):
            found.setdefault(m.engine, {})[m.metric.split(".")[1]] = m.value
    return found
