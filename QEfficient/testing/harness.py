# SPDX-License-Identifier: BSD-3-Clause
"""Tasks of lm-evaluation-harness, through its own library, on the base and on each adapter in PyTorch."""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoTokenizer

from QEfficient.contract import BASE
from QEfficient.errors import ConfigError
from QEfficient.testing.check import Check, Facts, Finding, passed
from QEfficient.testing.reference import Reference
from QEfficient.testing.report import Measurement, Outcome
from QEfficient.testing.text import number

_Z = 2.0
Score = tuple[float, float]
"""Value and standard error; the error is not finite if the task has none."""


@dataclass(slots=True)
class Scores:
    """What each subject reached: ``{subject: {(task, metric): (value, error)}}``."""

    found: dict[str, dict[tuple[str, str], Score]]

    def measurements(self) -> list[Measurement]:
        """Return every score, its ends one standard error away."""
        made = []
        for subject, scores in self.found.items():
            for (task, metric), (value, error) in scores.items():
                ends = (value - error, value + error) if math.isfinite(error) else (None, None)
                made.append(Measurement("pytorch", subject, f"lm_eval.{task}.{metric}", value, *ends))
        return made


def evaluate_tasks(
    reference: Reference,
    base: str,
    tasks: Sequence[str],
    subjects: Sequence[str],
    notify: Callable[[str], None] = lambda subject: None,
    limit: int | None = None,
) -> Scores:
    """Run tasks on the base and on each adapter.

    Args:
        reference: PyTorch + PEFT.
        base: Folder or Hub id of the base, for its tokenizer.
        tasks: Names that the harness knows, or YAML files of tasks.
        subjects: The base and the adapters.
        notify: Called with each subject before its turn.
        limit: Most examples of a task.

    Raises:
        ConfigError: The harness is not installed, the base has no tokenizer, or a task is unknown.
    """
    harness, known, models = (_import(f"lm_eval.{m}") for m in ("evaluator", "tasks", "models.huggingface"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as e:
        raise ConfigError(f"--lm-eval needs the base's tokenizer, which could not be loaded: {e}") from e
    names, folders = _named(tasks)
    manager = known.TaskManager(include_path=folders or None)
    if unknown := [n for n in names if n not in manager.all_tasks]:
        raise ConfigError(f"lm-evaluation-harness knows no task {unknown[0]!r}; a file of your own ends in .yaml")
    found = {}
    for subject in subjects:
        notify(subject)
        with reference.selected(subject) as model:
            engine = models.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
            results = harness.simple_evaluate(
                engine, tasks=names, task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
            )
        found[subject] = _scores(results["results"])
    return Scores(found)


def _named(tasks: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return names of tasks, and the folders that the harness must look into for those given as files."""
    names, folders = [], []
    for task in tasks:
        if task.endswith((".yaml", ".yml")):
            path = Path(task).expanduser()
            if not path.is_file():
                raise ConfigError(f"task file {task!r} does not exist")
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or not isinstance(content.get("task"), str):
                raise ConfigError(f"{task} is no task of lm-evaluation-harness: it has no 'task' name")
            names.append(content["task"])
            folders.append(str(path.resolve().parent))
        else:
            names.append(task)
    return names, folders


def _scores(results: dict[str, dict[str, Any]]) -> dict[tuple[str, str], Score]:
    """Read ``{"acc,none": 0.5, "acc_stderr,none": 0.1}`` of each task."""
    found = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, _, kept = key.partition(",")
            if isinstance(value, int | float) and "," in key and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{kept}")
                found[task, metric] = float(value), float(error) if isinstance(error, int | float) else math.nan
    return found


def _ask_tasks(scores: Scores, subject: str) -> Finding:
    ours, base = scores.found[subject], scores.found[BASE]
    facts: Facts = {f"{task}, {metric}": _says(*score) for (task, metric), score in ours.items()}
    bad = [key for key, (value, _) in ours.items() if not math.isfinite(value)]
    if bad:
        return Finding(Outcome.FAIL, f"{bad[0][0]}: {bad[0][1]} is not a number.", None, facts)
    said = ", ".join(f"{task} {metric} {_says(*score)}" for (task, metric), score in list(ours.items())[:3])
    if subject == BASE:
        return passed(f"{said}.", None, facts)
    worse = [
        k for k, (v, e) in ours.items() if k[1].startswith("acc") and base[k][0] - v > _Z * math.hypot(e, base[k][1])
    ]
    if worse:
        text = f"{said}. With the adapter {worse[0][0]} is worse than with the base ({_says(*base[worse[0]])}), beyond two standard errors"
        return Finding(Outcome.WARN, f"{text}. Is it what the adapter is for?", None, facts)
    return passed(f"{said}; no task is worse than with the base beyond two standard errors.", None, facts)


def _says(value: float, error: float) -> str:
    return f"{number(value)} ± {number(error)}" if math.isfinite(error) else number(value)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise ConfigError(
            f"--lm-eval needs lm-evaluation-harness, which is not installed: pip install 'efficient-transformers[lm-eval]' ({e})"
        ) from e


CHECKS: tuple[Check[Scores], ...] = (
    Check(
        "tasks",
        "Tasks of lm-evaluation-harness",
        "An adapter may be good at its text and have lost what the base could; accuracies two standard errors apart are no chance.",
        _ask_tasks,
        of_base=True,
    ),
)
"""Asked of the base and of each adapter if tasks are named."""
