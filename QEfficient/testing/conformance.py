# SPDX-License-Identifier: BSD-3-Clause
"""The test from beginning to end: read, check every stage, measure, report."""

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from QEfficient.contract import BASE
from QEfficient.errors import ConfigError
from QEfficient.options import suggest
from QEfficient.testing import checks_adapter, checks_efficiency, checks_graph, checks_pytorch
from QEfficient.testing.check import C, Check
from QEfficient.testing.checks_efficiency import Budgets
from QEfficient.testing.efficiency import measure
from QEfficient.testing.graphs import Graph, export_graphs, find_graph, opened
from QEfficient.testing.inputs import describe_adapter, describe_base, read_adapters, read_base_config
from QEfficient.testing.publish import publish
from QEfficient.testing.reference import Reference, load_base, tokenizer_of
from QEfficient.testing.report import Environment, Measurement, Report, Stage
from QEfficient.testing.workload import make_workload

Progress = Callable[[str, str], None]
"""Called with what is done (``"graph.prefill"``, ``"export"``) and for whom, before it is done."""

_NAMES = tuple(
    f"{stage.value}.{check.name}"
    for stage, checks in (
        (Stage.ADAPTER, checks_adapter.CHECKS),
        (Stage.PYTORCH, checks_pytorch.CHECKS),
        (Stage.GRAPH, checks_graph.CHECKS),
        (Stage.PROGRAM, checks_graph.CHECKS),
    )
    for check in checks
)


def run(
    base: str | Path,
    adapters: Mapping[str, str | Path],
    *,
    graph: str | Path | None = None,
    report_dir: str | Path | None = None,
    only: Sequence[str] = (),
    greedy_tokens: int = 64,
    measure_speed: bool = True,
    budgets: Budgets = Budgets(),  # noqa: B008 -- frozen
    progress: Progress = lambda what, subject: None,
) -> Report:
    """Test adapters of one base at every stage, against PyTorch + PEFT.

    Args:
        base: Folder or Hub id of the base.
        adapters: Names and folders of the adapters.
        graph: An exported graph to test; None exports one.
        report_dir: Where to write ``report.json``, ``junit.xml`` and ``report.html``; None writes nothing.
        only: Patterns of check names, ``"graph.*"`` for example; empty for all.
        greedy_tokens: How many tokens to generate for each prompt.
        measure_speed: Measure speed and memory as well.
        budgets: Limits of speed that are part of the verdict.
        progress: Told what is being done.

    Raises:
        QEffError: What was given cannot be tested: a missing folder, a damaged file, an adapter of another base.
    """
    tester = _Tester(str(base), adapters, graph, tuple(only), progress)
    start = time.perf_counter()
    report = tester.run(greedy_tokens, measure_speed, budgets)
    report.seconds = time.perf_counter() - start
    if report_dir is not None:
        publish(report, Path(report_dir))
    return report


class _Tester:
    """One run; holds what the stages share."""

    def __init__(
        self,
        base: str,
        adapters: Mapping[str, str | Path],
        graph: str | Path | None,
        only: tuple[str, ...],
        progress: Progress,
    ) -> None:
        for pattern in only:
            if not any(fnmatch(name, pattern) for name in _NAMES):
                raise ConfigError(f"no check is called {pattern!r}{suggest(pattern, _NAMES)}")
        self.base, self.graph, self.only, self.progress = base, graph, only, progress
        progress("read", BASE)
        self.config = read_base_config(base)
        self.files = read_adapters(adapters, self.config)
        self.names = tuple(self.files)
        self.report = Report(
            describe_base(base, self.config),
            tuple(describe_adapter(name, adapters[name], files) for name, files in self.files.items()),
            Environment.current(),
            command=_command(base, adapters, graph),
        )

    def run(self, greedy_tokens: int, measure_speed: bool, budgets: Budgets) -> Report:
        """Go through the stages; each subject through all of a graph's checks before the next."""
        for name, files in self.files.items():
            self.check(Stage.ADAPTER, checks_adapter.CHECKS, files, name)
        if not self.wants(Stage.PYTORCH, Stage.GRAPH, Stage.PROGRAM):
            return self.report
        reference, seconds = self.load(greedy_tokens)
        for name in (BASE, *self.names):
            self.check(Stage.PYTORCH, checks_pytorch.CHECKS, reference, name)
        if not self.wants(Stage.GRAPH, Stage.PROGRAM):
            return self.report
        for graph in self.graphs(reference):
            self.report.graph = self.report.graph or str(graph.folder)
            self.stages(reference, graph, seconds if measure_speed and not self.only else None, budgets)
        return self.report

    def load(self, greedy_tokens: int) -> tuple[Reference, float]:
        """Load base and adapters in PyTorch; return them and how long that took."""
        self.progress("load", BASE)
        encode = tokenizer_of(self.base)
        text = self.config.get_text_config()
        begin = time.perf_counter()
        model = load_base(self.base)
        seconds = time.perf_counter() - begin
        workload = make_workload(text.vocab_size, self.max_positions, encode, greedy_tokens)
        reference = Reference(model, workload)
        begin = time.perf_counter()
        for name, files in self.files.items():
            self.progress("load", name)
            reference.attach(name, files.path)
        return reference, seconds + time.perf_counter() - begin

    def graphs(self, reference: Reference) -> list[Graph]:
        """Find the graph that was given, or export."""
        if self.graph is not None:
            return [find_graph(reference, self.names, Path(self.graph))]
        self.progress("export", BASE)
        return export_graphs(reference, self.names)

    def stages(self, reference: Reference, graph: Graph, pytorch_seconds: float | None, budgets: Budgets) -> None:
        """Check graph and program, and measure the program."""
        with ExitStack() as stack:
            subjects = (BASE, *graph.fitted)
            self.progress("open graph", BASE)
            candidate = stack.enter_context(opened(Stage.GRAPH, graph, reference))
            for name in subjects:
                self.check(Stage.GRAPH, checks_graph.CHECKS, candidate, name)
            self.progress("compile", BASE)
            candidate = stack.enter_context(opened(Stage.PROGRAM, graph, reference))
            for name in subjects:
                self.check(Stage.PROGRAM, checks_graph.CHECKS, candidate, name)
            if pytorch_seconds is None or self.report.measurements:
                return
            found = self.measurements(reference, candidate.session, tuple(graph.fitted))
            loads = [("pytorch", pytorch_seconds), ("program", candidate.load_seconds)]
            found += [Measurement(engine, subjects[1], "load_seconds", seconds) for engine, seconds in loads]
            self.report.measurements += found
            for name in subjects:
                self.check(Stage.EFFICIENCY, checks_efficiency.checks(budgets), found, name)

    def measurements(self, reference: Reference, session: Any, names: tuple[str, ...]) -> list[Measurement]:
        """Measure both engines."""
        tell = lambda subject: self.progress("measure", subject)  # noqa: E731
        return measure(reference, session, names, max_positions=self.max_positions, notify=tell)

    @property
    def max_positions(self) -> int:
        """Longest context of the base, 0 if it names none."""
        return int(getattr(self.config.get_text_config(), "max_position_embeddings", 0) or 0)

    def wants(self, *stages: Stage) -> bool:
        """Whether any check of these stages was asked for."""
        prefixes = tuple(f"{s.value}." for s in stages)
        return any(n.startswith(prefixes) and self.asked(n) for n in _NAMES)

    def asked(self, name: str) -> bool:
        """Whether a check was asked for."""
        return not self.only or any(fnmatch(name, pattern) for pattern in self.only)

    def check(self, stage: Stage, checks: Sequence[Check[C]], context: C, subject: str) -> None:
        """Ask the questions of one stage about one subject."""
        for check in checks:
            name = f"{stage.value}.{check.name}"
            applies = check.of_base if subject == BASE else check.of_adapters
            if applies and (self.asked(name) or stage is Stage.EFFICIENCY):
                self.progress(name, subject)
                self.report.results.append(check.perform(stage, context, subject))


def _command(base: str, adapters: Mapping[str, str | Path], graph: str | Path | None) -> str:
    words = ["qefficient", "test", base]
    for name, path in adapters.items():
        words += ["--adapter", f"{name}={path}"]
    return shlex.join([*words, *(["--graph", str(graph)] if graph else [])])
