# SPDX-License-Identifier: BSD-3-Clause
"""``qefficient test``: prove that adapters work, and measure them."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from QEfficient.cloud.__main__ import run as run_command
from QEfficient.cloud.progress import progress, quiet
from QEfficient.contract import BASE, PRECISIONS
from QEfficient.errors import ConfigError
from QEfficient.options import option, parse

if TYPE_CHECKING:
    from QEfficient.testing.report import Report


@dataclass(slots=True, kw_only=True)
class Options:
    """Hold base and adapters against PyTorch + PEFT at every stage: files, PyTorch, exported graph, compiled program.

    Exit code 0: every adapter functions; 1: a check failed; 2: what was given cannot be tested.
    """

    base: str = option(help="Folder or Hub id of the base model.", positional=True)
    adapter: list[str] = option(help="An adapter and its name; may be repeated.", metavar="NAME=PATH")
    graph: Path | None = option(
        None, "Test this exported graph, and the adapters in it, instead of exporting.", metavar="DIR"
    )
    graph_format: str = option(
        "",
        "'genai': --graph is a model of onnxruntime-genai's builder, with the one adapter baked in.",
        metavar="FORMAT",
    )
    report: Path | None = option(
        None, "Write report.html, report.json, report.md and junit.xml into this folder.", metavar="DIR"
    )
    only: list[str] = option(
        [], "Run only checks of this name, 'graph.*' for example; may be repeated.", metavar="CHECK"
    )
    skip: list[str] = option(
        [], "Report checks of this name as skipped, for this reason; may be repeated.", metavar="CHECK=REASON"
    )
    engine: str = option(
        "local",
        "local: in this process; ray: over the cluster that RAY_ADDRESS names, or one on this machine, in groups of adapters.",
        choices=["local", "ray"],
    )
    jobs: int = option(1, "Processes that examine adapter folders; pays from some dozens of adapters on.")
    eval: Path | None = option(
        None, "Loss and perplexity on this text: rows with text, or prompt and completion.", metavar="JSONL"
    )
    precision: str = option(
        "fp32",
        "How the tested program holds the base's weights; bf16, int8 and int4 are judged on the text of --eval.",
        choices=PRECISIONS,
    )
    lm_eval: list[str] = option(
        [],
        "Task of lm-evaluation-harness, or a YAML file of one, run on base and adapters; may be repeated.",
        metavar="TASK",
    )
    lm_eval_limit: int | None = option(None, "Most examples of such a task.")
    baseline: Path | None = option(
        None, "Fail on what is worse than in this earlier report.json, beyond noise.", metavar="REPORT"
    )
    tokens: int | None = option(None, "Tokens to generate for each prompt; 64, or 32 from 300 million parameters on.")
    speed: bool = option(True, "Measure speed and memory.")
    min_speedup: float | None = option(
        None, "Fail if the program decodes less than this many times as fast as PyTorch."
    )
    max_overhead: str = option(
        "", "Fail if an adapter makes the program's tokens slower by more than this, 15%% for example."
    )


def command(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    if argv and argv[0] == "--diff":
        return diff(argv[1:])
    options = parse(Options, argv, prog="qefficient test")
    adapters = parse_adapters(options.adapter)
    if options.tokens is not None and options.tokens < 1:
        raise ConfigError(f"--tokens must be at least 1, not {options.tokens}")
    if options.jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, not {options.jobs}")
    from rich.console import Console

    from QEfficient.testing.render_terminal import view

    with quiet(), progress() as show:
        from QEfficient.testing.checks_efficiency import Budgets, parse_share
        from QEfficient.testing.cluster import run_on_ray
        from QEfficient.testing.conformance import run

        ask = run_on_ray if options.engine == "ray" else run
        most = parse_share(options.max_overhead, "--max-overhead") if options.max_overhead else None
        report = ask(
            options.base,
            adapters,
            graph=options.graph,
            graph_format=options.graph_format,
            report_dir=options.report,
            only=options.only,
            skip=parse_skips(options.skip),
            jobs=options.jobs,
            eval_data=options.eval,
            lm_eval=options.lm_eval,
            lm_eval_limit=options.lm_eval_limit,
            baseline=options.baseline,
            greedy_tokens=options.tokens,
            measure_speed=options.speed,
            precision=options.precision,
            budgets=Budgets(options.min_speedup, most),
            progress=show,
        )
    Console(highlight=False, width=None if sys.stdout.isatty() else 80).print(view(report))
    if options.report is not None:
        print(f"\nreport: {options.report / 'report.html'}")
    return exit_code(report)


@dataclass(slots=True, kw_only=True)
class DiffOptions:
    """Compare two reports. Exit code 0: nothing is worse beyond noise; 1: something is."""

    before: Path = option(help="The earlier report.json, or its folder.", positional=True)
    after: Path = option(help="The later one.", positional=True)


def diff(argv: Sequence[str]) -> int:
    """Print what differs between two reports."""
    options = parse(DiffOptions, argv, prog="qefficient test --diff")
    from QEfficient.testing.baseline import compare, read_report

    changes = compare(read_report(options.before), read_report(options.after))
    for change in changes:
        print(f"{'worse' if change.worse else 'other'}  {change.subject}  {change.what}: {change.text}")
    worse = sum(c.worse for c in changes)
    print(f"{worse} worse, {len(changes) - worse} otherwise changed")
    return 1 if worse else 0


def parse_skips(given: Sequence[str]) -> dict[str, str]:
    """Return ``CHECK=REASON`` pairs as a dict.

    Raises:
        ConfigError: A pair has no reason.
    """
    found = {}
    for pair in given:
        name, _, reason = pair.partition("=")
        if not name or not reason.strip():
            raise ConfigError(f"--skip takes CHECK=REASON, for example pytorch.merge='served unmerged', not {pair!r}")
        found[name] = reason.strip()
    return found


def exit_code(report: "Report") -> int:
    """Return 0 if the verdict is a pass, otherwise 1."""
    return 0 if report.verdict.value == "pass" else 1


def parse_adapters(given: Sequence[str]) -> dict[str, str]:
    """Return ``NAME=PATH`` pairs as a dict.

    Raises:
        ConfigError: A pair is malformed, a name is given twice or is ``"base"``.
    """
    found: dict[str, str] = {}
    for pair in given:
        name, equals, path = pair.partition("=")
        if not equals or not name or not path:
            raise ConfigError(f"--adapter takes NAME=PATH, for example sql=adapters/sql, not {pair!r}")
        if name == BASE:
            raise ConfigError(f"an adapter cannot be called {BASE!r}: that name means no adapter; choose another name")
        if name in found:
            raise ConfigError(f"two adapters are called {name!r} ({found[name]} and {path}); give each its own name")
        found[name] = path
    return found


if __name__ == "__main__":
    sys.exit(run_command("test"))
