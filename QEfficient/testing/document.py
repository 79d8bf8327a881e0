# SPDX-License-Identifier: BSD-3-Clause
"""``docs/checks.md``, ``docs/report.md`` and ``docs/report.schema.json``, made from the checks and the report's dataclasses.

``python -m QEfficient.testing.document docs`` writes them; a test keeps them up to date.
"""

import dataclasses
import inspect
import json
import sys
import typing
from pathlib import Path
from typing import Any

from QEfficient.testing import checks_efficiency, render_json, report
from QEfficient.testing.check import Check
from QEfficient.testing.report import Stage
from QEfficient.testing.selection import GROUP, catalog

_ABOUT = {
    Stage.ADAPTER: "The adapter's folder against the base's structure. No model runs.",
    Stage.PYTORCH: "The adapted model in PyTorch + PEFT, float32.",
    Stage.GRAPH: "The exported graph in ONNX Runtime, against PyTorch + PEFT in float32. `program.*` asks the same of the compiled program.",
    Stage.PROGRAM: "What the graph is asked, and besides:",
    Stage.QUALITY: "`loss` and `answers` with `--eval`, `precision` with `--precision` besides, `tasks` with `--lm-eval`.",
    Stage.EFFICIENCY: "With a budget.",
    Stage.BASELINE: "With `--baseline`.",
}


def checks() -> str:
    """Return the page of all checks."""
    found: dict[Stage, tuple[Check[Any], ...]] = dict(catalog())
    found[Stage.EFFICIENCY] = checks_efficiency.checks(checks_efficiency.Budgets(2.0, 0.15))
    lines = [
        "# Checks",
        "",
        "What `qefficient test` asks, what each answer is held against, and why. Generated from the checks themselves.",
        "",
        "`--only graph.prefill` asks one (patterns too: `'adapter.*'`); `--skip pytorch.merge='served unmerged'` reports one as skipped, with the reason.",
        "What PEFT itself does differently (merging LoRA on tied embeddings, for example) is skipped or warned of with that explanation.",
        f"A package adds checks of its own through the entry point group `{GROUP}`: an iterable of pairs of a stage and a `Check`.",
    ]
    shared = {c.name for c in found[Stage.GRAPH]}
    found[Stage.PROGRAM] = tuple(c for c in found[Stage.PROGRAM] if c.name not in shared)
    for stage, about in _ABOUT.items():
        lines += ["", f"## {stage.value}", "", about, "", "| check | question | passes if | why |", "|---|---|---|---|"]
        lines += [f"| `{stage.value}.{c.name}` | {c.title} | {_limit(c)} | {_cell(c.reason)} |" for c in found[stage]]
    return "\n".join([*lines, ""])


def _limit(check: Check[Any]) -> str:
    if check.tolerance is None:
        return "the answer is yes"
    sign = "≥" if check.at_least else "≤"
    return f"{sign} {check.tolerance:g} {check.unit}".strip()


def schema() -> str:
    """Return the page of the JSON report."""
    lines = [
        "# The report as JSON",
        "",
        f"`report.json`, schema version {report.SCHEMA_VERSION}. Generated from the dataclasses; [report.schema.json](report.schema.json) is its JSON Schema.",
        "The version grows when a key changes its meaning or goes; new keys alone do not change it. Besides the keys of `Report` there are `verdict`",
        '(`"pass"` or `"fail"`) and `summary` (one sentence). Numbers that are not finite are `null`.',
    ]
    for kind in (
        report.Report,
        report.Subject,
        report.Environment,
        report.CheckResult,
        report.Series,
        report.Measurement,
    ):
        text = inspect.cleandoc(kind.__doc__ or "").splitlines()[0]
        lines += ["", f"## {kind.__name__}", "", text, "", "| key | type | meaning |", "|---|---|---|"]
        meanings = _attributes(kind)
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            lines.append(f"| `{field.name}` | `{_type(hints[field.name])}` | {_cell(meanings.get(field.name, ''))} |")
    outcomes = ", ".join(f"`{o.value}`" for o in report.Outcome)
    stages = ", ".join(f"`{s.value}`" for s in Stage)
    return "\n".join([*lines, "", f"Outcomes: {outcomes}. Stages: {stages}.", ""])


def _attributes(kind: type) -> dict[str, str]:
    """Return the meanings that a docstring's ``Attributes:`` gives."""
    found: dict[str, str] = {}
    inside, name = False, ""
    for line in inspect.cleandoc(kind.__doc__ or "").splitlines():
        if line.startswith("Attributes:"):
            inside = True
        elif inside and line.startswith("    ") and not line.startswith("     ") and ":" in line:
            name, _, text = line.strip().partition(": ")
            found[name] = text
        elif inside and line.startswith("     ") and name:
            found[name] += " " + line.strip()
    return found


def _type(hint: Any) -> str:
    name = getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint)
    return name.replace("QEfficient.testing.report.", "").replace("|", "or")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("``", "`")


def json_schema() -> str:
    """Return the JSON Schema of ``report.json``."""
    return json.dumps(render_json.schema(), indent=1) + "\n"


PAGES = {"checks.md": checks, "report.md": schema, "report.schema.json": json_schema}
"""What is generated, and by whom."""

if __name__ == "__main__":
    for page, make in PAGES.items():
        (Path(sys.argv[1]) / page).write_text(make(), encoding="utf-8")
