# SPDX-License-Identifier: BSD-3-Clause
"""The test from beginning to end: read, check every stage, measure, report."""

import copy
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftConfig

from QEfficient.contract import BASE, PRECISIONS, Manifest
from QEfficient.errors import ConfigError, QEffError
from QEfficient.export.skeleton import longest_context, uncounted_token
from QEfficient.options import suggest
from QEfficient.peft.loading import load_base, read_base_config
from QEfficient.testing import checks_efficiency, harness, quality
from QEfficient.testing.adapter_stage import examine_all
from QEfficient.testing.baseline import read_report
from QEfficient.testing.candidate import Candidate
from QEfficient.testing.check import C, Check
from QEfficient.testing.checks_efficiency import Budgets
from QEfficient.testing.efficiency import measure, of_loading
from QEfficient.testing.genai import ASKED, opened_genai
from QEfficient.testing.graphs import Graph, export_graphs, find_graph, opened
from QEfficient.testing.inputs import describe_base
from QEfficient.testing.known import keeps_apart
from QEfficient.testing.loading import Loading
from QEfficient.testing.precision import CHECKS as PRECISION_CHECKS
from QEfficient.testing.precision import SAME_BITS, evaluate_rounded
from QEfficient.testing.publish import publish
from QEfficient.testing.reference import Reference, tokenizer_of
from QEfficient.testing.regressions import regress
from QEfficient.testing.report import Environment, Measurement, Outcome, Report, Stage
from QEfficient.testing.selection import Progress, Selection, catalog, perform
from QEfficient.testing.workload import default_tokens, make_workload


def run(
    base: str | Path,
    adapters: Mapping[str, str | Path],
    *,
    graph: str | Path | None = None,
    graph_format: str = "",
    report_dir: str | Path | None = None,
    only: Sequence[str] = (),
    skip: Mapping[str, str] | None = None,
    jobs: int = 1,
    eval_data: str | Path | None = None,
    lm_eval: Sequence[str] = (),
    lm_eval_limit: int | None = None,
    baseline: str | Path | None = None,
    greedy_tokens: int | None = None,
    measure_speed: bool = True,
    budgets: Budgets = Budgets(),  # noqa: B008 -- frozen
    precision: str = "fp32",
    progress: Progress = lambda what, subject: None,
) -> Report:
    """Test adapters of one base at every stage, against PyTorch + PEFT.

    Args:
        base: Folder or Hub id of the base.
        adapters: Names and folders of the adapters.
        graph: An exported graph to test; None exports one.
        graph_format: ``"genai"`` if ``graph`` is what onnxruntime-genai's builder wrote, with the one adapter baked in.
        report_dir: Where to write ``report.json``, ``junit.xml`` and ``report.html``; None writes nothing.
        only: Patterns of check names, ``"graph.*"`` for example; empty for all.
        skip: Patterns of check names that are not asked, and why.
        jobs: Processes that examine the adapters' files; more than 1 pays from some dozens of adapters on.
        eval_data: JSONL file with ``text``, or ``prompt`` and ``completion``, for loss and perplexity.
        lm_eval: Tasks of lm-evaluation-harness, by name or as YAML files.
        lm_eval_limit: Most examples of a task.
        baseline: An earlier report, or its folder; what is worse beyond noise fails.
        greedy_tokens: How many tokens to generate for each prompt; None for 64, or 32 where the base has 300 million parameters.
        measure_speed: Measure speed and memory as well.
        budgets: Limits of speed that are part of the verdict.
        precision: How the program holds the base's weights; one of ``"bf16"``, ``"int8"`` and ``"int4"`` is judged on ``eval_data``.
        progress: Told what is being done.

    Raises:
        QEffError: What was given cannot be tested: a missing folder, a damaged file, an adapter of another base.
    """
    refuse_format(graph_format, graph, adapters)
    refuse_precision(precision, eval_data, graph_format)
    tester = _Tester(str(base), adapters, graph, Selection(tuple(only), dict(skip or {})), progress)
    start = time.perf_counter()
    earlier = read_report(baseline) if baseline is not None else None
    tester.eval_data, tester.tasks, tester.task_limit = eval_data, tuple(lm_eval), lm_eval_limit
    tester.graph_format, tester.precision = graph_format, precision
    tester.read(jobs)
    report = tester.run(greedy_tokens, measure_speed, budgets)
    for name in tester.apart:
        tester.run_apart(name, greedy_tokens, measure_speed, budgets)
    if earlier is not None:
        tester.regress(earlier)
    report.seconds = time.perf_counter() - start
    if report_dir is not None:
        publish(report, Path(report_dir))
    return report


def refuse_format(graph_format: str, graph: str | Path | None, adapters: Mapping[str, str | Path]) -> None:
    """Refuse a format that is unknown, or that the other arguments do not go with.

    Raises:
        ConfigError: What is wrong, and what to give.
    """
    if graph_format not in ("", "genai"):
        raise ConfigError(f"unknown graph format {graph_format!r}; this project's own needs none, the other is 'genai'")
    if graph_format and graph is None:
        raise ConfigError(f"graph format {graph_format!r} needs the graph's folder: give --graph DIR as well")
    if graph_format and len(adapters) != 1:
        raise ConfigError(f"a {graph_format} model has one adapter baked in; {len(adapters)} were given: give that one")


def refuse_precision(precision: str, eval_data: str | Path | None, graph_format: str) -> None:
    """Refuse a precision that is unknown, or that cannot be judged.

    Raises:
        ConfigError: What is wrong, and what to give.
    """
    if precision not in PRECISIONS:
        *others, last = PRECISIONS
        raise ConfigError(
            f"unknown precision {precision!r}{suggest(precision, PRECISIONS)}; give {', '.join(others)} or {last}"
        )
    if precision != "fp32" and eval_data is None:
        raise ConfigError(f"precision {precision} is judged by perplexity and divergence on text: give --eval as well")
    if precision != "fp32" and graph_format:
        raise ConfigError(f"precision {precision} is of programs that are compiled here, not of a {graph_format} model")


class _Tester:
    """One run; holds what the stages share."""

    def __init__(
        self,
        base: str,
        adapters: Mapping[str, str | Path],
        graph: str | Path | None,
        selection: Selection,
        progress: Progress,
    ) -> None:
        self.checks = catalog()
        selection.validate([f"{stage.value}.{c.name}" for stage, checks in self.checks.items() for c in checks])
        self.base, self.adapters, self.graph, self.selection, self.progress = base, adapters, graph, selection, progress
        progress("read", BASE)
        self.config = read_base_config(base)
        self.paths: dict[str, Path] = {}
        self.apart: dict[str, Path] = {}
        self.refused: dict[str, QEffError] = {}
        self.tokens: list[int] = []
        self.eval_data: str | Path | None = None
        self.tasks: tuple[str, ...] = ()
        self.task_limit: int | None = None
        self.graph_format, self.precision = "", "fp32"
        self.rows: list[quality.Row] = []
        command = _command(base, adapters, graph)
        self.report = Report(describe_base(base, self.config), (), Environment.current(), command=command)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that can be loaded."""
        return tuple(self.paths)

    def read(self, jobs: int) -> None:
        """Examine every adapter's files; refuse the run if none of them can be loaded.

        Raises:
            QEffError: Why the first cannot be.
        """
        found = examine_all(self.adapters, self.base, self.config, self.selection, self.progress, jobs=jobs)
        errors = [one.error for one in found.values() if one.error is not None]
        if len(errors) == len(found):
            raise errors[0]
        self.report.adapters = tuple(one.subject for one in found.values())
        self.report.results += [r for one in found.values() for r in one.results]
        self.paths = {name: one.path for name, one in found.items() if one.error is None}
        self.separate()
        self.tokens = sorted({t for one in found.values() if one.error is None for t in one.tokens})

    def separate(self) -> None:
        """Set apart the adapters for which PEFT changes the base: the others are held against their own."""
        moving = [name for name, path in self.paths.items() if keeps_apart(PeftConfig.from_pretrained(str(path)))]
        only_these = len(moving) == len(self.paths)
        self.apart = {name: self.paths.pop(name) for name in moving[only_these:]}

    def run(self, greedy_tokens: int | None, measure_speed: bool, budgets: Budgets) -> Report:
        """Go through the stages that run the model; each subject through all of a graph's checks before the next."""
        if not self.wants(Stage.PYTORCH, Stage.GRAPH, Stage.PROGRAM) and self.eval_data is None and not self.tasks:
            return self.report
        reference, loading = self.load(greedy_tokens)
        for name in (BASE, *self.names):
            self.check(Stage.PYTORCH, self.checks[Stage.PYTORCH], reference, name)
        if self.eval_data is not None:
            self.evaluate(reference)
        if self.tasks:
            self.run_tasks(reference)
        if not self.wants(Stage.GRAPH, Stage.PROGRAM):
            return self.report
        if self.graph_format:
            self.foreign(reference)
            return self.report
        for graph in self.graphs(reference):
            self.report.graph = self.report.graph or str(graph.folder)
            self.stages(reference, graph, loading if measure_speed and not self.selection.only else None, budgets)
        return self.report

    def run_apart(self, name: str, greedy_tokens: int | None, measure_speed: bool, budgets: Budgets) -> None:
        """Run the model's stages with one adapter that PEFT takes beside no other; the base has been asked already."""
        alone, refusal = copy.copy(self), self.refused.get(name)
        alone.paths, alone.apart, alone.refused = {name: self.apart[name]}, {}, {}
        alone.report = replace(self.report, results=[], measurements=[])
        check = next(c for c in self.checks[Stage.ADAPTER] if c.name == "shapes")
        try:
            found = alone.run(greedy_tokens, measure_speed, budgets)
        except QEffError as e:
            self.report.results.append(check.result(Stage.ADAPTER, name, Outcome.FAIL, f"PEFT cannot load it: {e}"))
            return
        if refusal is not None:
            text = f"PEFT cannot load it beside the others, so it was tested apart: {refusal}"
            self.report.results.append(check.result(Stage.ADAPTER, name, Outcome.WARN, text))
        self.report.results += [r for r in found.results if r.subject == name]
        self.report.measurements += [m for m in found.measurements if m.subject == name]

    def load(self, greedy_tokens: int | None) -> tuple[Reference, Loading]:
        """Load base and adapters in PyTorch; return them and what that took."""
        self.progress("load", BASE)
        encode = tokenizer_of(self.base)
        text = self.config.get_text_config()
        with Loading() as loading:
            # The attention that follows the model's definition to the letter is the truth.
            model = load_base(self.base, attn_implementation="eager")
        count = greedy_tokens or default_tokens(model.num_parameters())
        # No test goes beyond what a graph of the base allows.
        workload = make_workload(
            text.vocab_size, longest_context(model), encode, count, self.tokens, uncounted_token(model)
        )
        reference = Reference(model, workload)
        with loading:
            for name, path in list(self.paths.items()):
                self.progress("load", name)
                self.attach(reference, name, path)
        return reference, loading

    def evaluate(self, reference: Reference) -> None:
        """Take the loss of base and adapters on the given text."""
        self.rows = quality.read_rows(str(self.eval_data), tokenizer_of(self.base))
        names = (BASE, *self.names)
        found = quality.evaluate(reference, self.rows, names, lambda name: self.progress("evaluate", name))
        self.report.measurements += found.measurements()
        for name in names:
            self.check(Stage.QUALITY, quality.CHECKS, found, name)

    def run_tasks(self, reference: Reference) -> None:
        """Run tasks of lm-evaluation-harness on base and adapters."""
        names = (BASE, *self.names)
        tell = lambda name: self.progress("lm-eval", name)  # noqa: E731
        found = harness.evaluate_tasks(reference, self.base, self.tasks, names, tell, self.task_limit)
        self.report.measurements += found.measurements()
        for name in names:
            self.check(Stage.QUALITY, harness.CHECKS, found, name)

    def regress(self, earlier: Report) -> None:
        """Compare with an earlier report."""
        regress(self.report, earlier, self.selection, self.progress)

    def attach(self, reference: Reference, name: str, path: Path) -> None:
        """Load one adapter with PEFT; what it refuses is left out, and tried apart from the others unless it is the last."""
        try:
            reference.attach(name, path)
        except QEffError as e:
            del self.paths[name]
            if not self.paths:
                raise
            self.apart[name], self.refused[name] = path, e

    def graphs(self, reference: Reference) -> list[Graph]:
        """Find the graph that was given, or export."""
        if self.graph is not None:
            return [find_graph(reference, self.names, Path(self.graph))]
        self.progress("export", BASE)
        return export_graphs(reference, self.names)

    def foreign(self, reference: Reference) -> None:
        """Check a graph that another tool made, with the adapter baked in."""
        folder, (name,) = Path(str(self.graph)), self.names
        self.report.graph = str(folder)
        self.progress("open graph", name)
        checks = [c for c in self.checks[Stage.GRAPH] if c.name in ASKED]
        with opened_genai(folder, reference, name) as candidate:
            self.check(Stage.GRAPH, checks, candidate, name)

    def stages(self, reference: Reference, graph: Graph, pytorch: Loading | None, budgets: Budgets) -> None:
        """Check graph and program, and measure the program."""
        with ExitStack() as stack:
            subjects = (BASE, *graph.fitted)
            self.progress("open graph", BASE)
            candidate = stack.enter_context(opened(Stage.GRAPH, graph, reference))
            for name in subjects:
                self.check(Stage.GRAPH, self.checks[Stage.GRAPH], candidate, name)
            self.progress("compile", BASE)
            candidate = stack.enter_context(opened(Stage.PROGRAM, graph, reference, self.precision))
            exact = self.precision == "fp32"
            for name in subjects:
                asked = [c for c in self.checks[Stage.PROGRAM] if exact or c.name in SAME_BITS]
                self.check(Stage.PROGRAM, asked, candidate, name)
            if not exact:
                self.judge_rounded(reference, candidate, subjects)
            if pytorch is None or any(m.engine == "program" for m in self.report.measurements):
                return
            found = self.measurements(reference, candidate.session, tuple(graph.fitted))
            found += of_loading({"pytorch": pytorch, "program": candidate.loading}, found, subjects[1])
            self.report.measurements += found
            for name in subjects:
                self.check(Stage.EFFICIENCY, checks_efficiency.checks(budgets), found, name)

    def judge_rounded(self, reference: Reference, candidate: Candidate, subjects: tuple[str, ...]) -> None:
        """Judge a program of rounded weights on the given text."""
        tell = lambda name: self.progress(f"judge {self.precision}", name)  # noqa: E731
        manifest = Manifest.read(candidate.folder)
        found = evaluate_rounded(reference, candidate.session, manifest, self.rows, subjects, tell)
        self.report.measurements += found.measurements()
        for name in subjects:
            self.check(Stage.QUALITY, PRECISION_CHECKS, found, name)

    def measurements(self, reference: Reference, session: Any, names: tuple[str, ...]) -> list[Measurement]:
        """Measure both engines."""
        tell = lambda subject: self.progress("measure", subject)  # noqa: E731
        return measure(reference, session, names, max_positions=longest_context(reference.model), notify=tell)

    def wants(self, *stages: Stage) -> bool:
        """Whether any check of these stages is asked."""
        names = (f"{stage.value}.{c.name}" for stage in stages for c in self.checks[stage])
        return any(self.selection.asked(n) and self.selection.reason(n) is None for n in names)

    def check(self, stage: Stage, checks: Sequence[Check[C]], context: C, subject: str) -> None:
        """Ask the questions of one stage about one subject."""
        asked_for = stage in (Stage.EFFICIENCY, Stage.QUALITY)  # by an option of their own
        selection = Selection(skip=self.selection.skip) if asked_for else self.selection
        self.report.results += perform(stage, checks, context, subject, selection, self.progress)


def _command(base: str, adapters: Mapping[str, str | Path], graph: str | Path | None) -> str:
    words = ["qefficient", "test", base]
    for name, path in adapters.items():
        words += ["--adapter", f"{name}={path}"]
    return shlex.join([*words, *(["--graph", str(graph)] if graph else [])])
