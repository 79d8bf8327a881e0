# SPDX-License-Identifier: BSD-3-Clause
"""The result of a test: one typed object, which every rendering reads.

Knows no model, no file and no format; the ``render_*`` modules turn it into text.
"""

import dataclasses
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from importlib import metadata
from typing import Any

SCHEMA_VERSION = 1
_LIBRARIES = ("efficient-transformers", "torch", "transformers", "peft", "onnx", "onnxruntime", "numpy")


class Outcome(StrEnum):
    """What a check found. ``WARN`` and ``SKIP`` do not change the verdict."""

    PASS = "pass"
    FAIL = "fail"
    WARN = "warn"
    SKIP = "skip"


class Stage(StrEnum):
    """The station of an adapter's life that a check looks at, in order."""

    ADAPTER = "adapter"
    PYTORCH = "pytorch"
    GRAPH = "graph"
    PROGRAM = "program"
    QUALITY = "quality"
    EFFICIENCY = "efficiency"
    BASELINE = "baseline"


@dataclass(frozen=True, slots=True)
class Series:
    """Numbers along an axis, to be plotted as evidence.

    Attributes:
        label: What the values are, ``"difference"`` for example.
        x: Where, for example ``"prefill 23"`` or ``"decode 4"``.
        y: The values, as many as ``x``.
    """

    label: str
    x: tuple[str, ...]
    y: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What one check found for one subject.

    Attributes:
        name: The check, ``"graph.prefill"`` for example.
        title: The same in words.
        subject: The adapter's name, or ``"base"``.
        stage: Station of the adapter's life.
        outcome: Pass, fail, warn or skip.
        message: What was found; for a failure also where, how large, and what to do.
        reason: Why the tolerance is what it is, or why the check exists when it has none.
        measured: The number that was judged, if there is one.
        tolerance: What ``measured`` was held against, if anything.
        unit: Unit of both, ``""`` for a plain ratio.
        at_least: ``measured`` must reach ``tolerance`` instead of staying below it.
        facts: Evidence as name and value.
        series: Evidence to be plotted.
        seconds: How long the check took.
    """

    name: str
    title: str
    subject: str
    stage: Stage
    outcome: Outcome
    message: str
    reason: str
    measured: float | None = None
    tolerance: float | None = None
    unit: str = ""
    at_least: bool = False
    facts: dict[str, str | float | int] = field(default_factory=dict)
    series: tuple[Series, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Measurement:
    """One measured quantity; a set of them with the same metric makes a comparison.

    Attributes:
        engine: ``"pytorch"`` or ``"program"``.
        subject: The adapter's name, or ``"base"``.
        metric: For example ``"decode_tokens_per_second"``; ``"memory_bytes.<part>"`` for a part of the memory.
        value: The median where it was repeated.
        low: Smallest repetition.
        high: Largest repetition.
    """

    engine: str
    subject: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None


def measured(measurements: Iterable[Measurement], engine: str, subject: str, metric: str) -> Measurement | None:
    """Return one quantity, or None if it was not measured."""
    wanted = (engine, subject, metric)
    return next((m for m in measurements if (m.engine, m.subject, m.metric) == wanted), None)


@dataclass(frozen=True, slots=True)
class Subject:
    """The base or one adapter.

    Attributes:
        name: ``"base"`` or the adapter's name.
        path: Folder or Hub id.
        method: PEFT's name of the method, ``""`` for the base.
        description: For example ``"rank 8, 14 modules, 51 kB"``.
    """

    name: str
    path: str
    method: str = ""
    description: str = ""


@dataclass(frozen=True, slots=True)
class Environment:
    """The machine and the versions that a result belongs to."""

    machine: str
    cores: int
    memory_bytes: int
    python: str
    versions: dict[str, str]

    @classmethod
    def current(cls) -> "Environment":
        """Describe this machine, without its name or any path."""
        return cls(
            machine=f"{platform.system()} {platform.machine()}",
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            python=platform.python_version(),
            versions=dict(_installed(_LIBRARIES)),
        )


@dataclass(slots=True)
class Report:
    """Everything that one run of the test found.

    Attributes:
        base: The base.
        adapters: The adapters, in the order given.
        environment: Where it ran.
        command: A command line that repeats the run.
        started: UTC, ISO 8601.
        seconds: How long the run took.
        graph: The graph folder that was tested, ``""`` when there was none.
        results: One for each check and subject, in the order they ran.
        measurements: Speed and memory.
        schema_version: Version of the JSON rendering.
    """

    base: Subject
    adapters: tuple[Subject, ...]
    environment: Environment
    command: str = ""
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    seconds: float = 0.0
    graph: str = ""
    results: list[CheckResult] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    @property
    def verdict(self) -> Outcome:
        """``FAIL`` if any check failed or none ran, ``PASS`` otherwise."""
        ran = [r for r in self.results if r.outcome is not Outcome.SKIP]
        return Outcome.FAIL if not ran or any(r.outcome is Outcome.FAIL for r in ran) else Outcome.PASS

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """The base, then the adapters."""
        return (self.base, *self.adapters)

    def with_outcome(self, outcome: Outcome, subject: str | None = None) -> list[CheckResult]:
        """Return the results with this outcome, of one subject or of all."""
        return [r for r in self.results if r.outcome == outcome and subject in (None, r.subject)]

    def findings(self) -> list[list[CheckResult]]:
        """Return what failed and then what warned, one list for each subject; its first entry is the earliest, so the cause."""
        groups: dict[tuple[Outcome, str], list[CheckResult]] = {}
        for result in [*self.with_outcome(Outcome.FAIL), *self.with_outcome(Outcome.WARN)]:
            groups.setdefault((result.outcome, result.subject), []).append(result)
        return list(groups.values())

    def verdict_of(self, subject: str) -> Outcome:
        """Return the worst outcome of one subject's checks."""
        found = {r.outcome for r in self.results if r.subject == subject}
        return next((o for o in (Outcome.FAIL, Outcome.WARN, Outcome.PASS) if o in found), Outcome.SKIP)

    def value(self, engine: str, subject: str, metric: str) -> float | None:
        """Return one measured value, or None if it was not measured."""
        found = measured(self.measurements, engine, subject, metric)
        return found.value if found is not None else None

    def summary(self) -> str:
        """Return the verdict in one sentence."""
        sound = [a.name for a in self.adapters if self.verdict_of(a.name) is not Outcome.FAIL]
        counts = {o: len(self.with_outcome(o)) for o in Outcome}
        tail = f"{counts[Outcome.PASS]} checks passed, {counts[Outcome.FAIL]} failed"
        tail += "".join(f", {counts[o]} {word}" for o, word in _EXTRA if counts[o])
        if self.verdict is Outcome.PASS:
            every = {0: "The base functions", 1: "The adapter functions"}.get(len(self.adapters))
            return f"{every or f'All {len(self.adapters)} adapters function'} as in PyTorch + PEFT: {tail}."
        if self.verdict_of(self.base.name) is Outcome.FAIL:
            return f"The base itself does not function as in PyTorch: {tail}."
        return f"{len(sound)} of {len(self.adapters)} adapters function as in PyTorch + PEFT: {tail}."

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, with the verdict: what the JSON rendering writes."""
        return {"verdict": self.verdict.value, "summary": self.summary(), **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Report":
        """Rebuild a report from :meth:`to_dict`'s data."""
        known = {f.name: data[f.name] for f in dataclasses.fields(cls)}
        known["base"] = Subject(**data["base"])
        known["adapters"] = tuple(Subject(**a) for a in data["adapters"])
        known["environment"] = Environment(**data["environment"])
        known["results"] = [_result(r) for r in data["results"]]
        known["measurements"] = [Measurement(**m) for m in data["measurements"]]
        return cls(**known)


_EXTRA = ((Outcome.WARN, "warned"), (Outcome.SKIP, "skipped"))


def _result(data: dict[str, Any]) -> CheckResult:
    series = tuple(Series(s["label"], tuple(s["x"]), tuple(s["y"])) for s in data["series"])
    return CheckResult(**{**data, "stage": Stage(data["stage"]), "outcome": Outcome(data["outcome"]), "series": series})


def _installed(names: Iterable[str]) -> Iterable[tuple[str, str]]:
    for name in names:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
