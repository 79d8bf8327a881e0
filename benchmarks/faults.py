# SPDX-License-Identifier: BSD-3-Clause
"""How many planted faults ``qefficient test`` catches, and how many sound models it accuses.

::

    python -m benchmarks.faults            # all: several architectures and methods
    python -m benchmarks.faults --quick    # one architecture, every kind once

A fault is *caught* if a check fails or warns that is not so without it, and *named* if that is a check meant for it.
Prints the table of kinds, then the misses, then one JSON line.
"""

import argparse
import dataclasses
import json
import os
import platform
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import AutoConfig

from QEfficient import testing
from QEfficient.peft.loading import load_base
from QEfficient.testing.adapter_stage import examine
from QEfficient.testing.candidate import Candidate
from QEfficient.testing.checks_graph import CHECKS as GRAPH_CHECKS
from QEfficient.testing.checks_pytorch import CHECKS as PYTORCH_CHECKS
from QEfficient.testing.graphs import Graph, export_graphs, opened
from QEfficient.testing.reference import Reference
from QEfficient.testing.report import CheckResult, Outcome, Stage
from QEfficient.testing.selection import Selection
from QEfficient.testing.workload import make_workload
from tests.testing.healthy import HEALTHY
from tests.testing.planted_adapters import ADAPTER_FAULTS
from tests.testing.planted_graphs import GRAPH_FAULTS, SESSION_FAULTS, GraphFault
from tests.testing.planted_pytorch import MODEL_FAULTS
from tests.tiny import VOCAB, lora, save_adapter, save_base

ADAPTER_CASES = ("lora", "lora on gpt2", "lora on qwen3", "dora", "ia3", "oft", "loha")
MODEL_CASES = ("lora", "rslora", "lora on qwen3")
GRAPH_CASES = ("lora", "lora on qwen3", "lora on gemma2")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One fault planted in one case."""

    group: str
    fault: str
    case: str
    caught: bool
    named: bool
    by: tuple[str, ...]


def judge(
    group: str, fault: str, case: str, checks: tuple[str, ...], before: set[str], results: list[CheckResult]
) -> Trial:
    """Return what the checks made of a fault."""
    flagged = _flagged(results) - before
    return Trial(group, fault, case, bool(flagged), bool(flagged & set(checks)), tuple(sorted(flagged)))


def _flagged(results: list[CheckResult]) -> set[str]:
    return {r.name for r in results if r.outcome in (Outcome.FAIL, Outcome.WARN)}


def adapter_trials(case: str, root: Path) -> Iterator[Trial]:
    """Plant every fault of a folder."""
    style, make = HEALTHY[case]
    base = save_base(root / "base", style)
    sound = save_adapter(base, root / "sound", config=make())
    config = AutoConfig.from_pretrained(base)
    before = _flagged(examine("one", sound, str(base), config, Selection()).results)
    for index, fault in enumerate(ADAPTER_FAULTS):
        folder = Path(shutil.copytree(sound, root / f"fault-{index}"))
        try:
            fault.plant(folder)
        except (StopIteration, RuntimeError, KeyError, TypeError):
            continue  # this method has no such tensor or field
        if fault.lora and not case.startswith("lora"):
            continue
        found = examine("one", folder, str(base), config, Selection())
        yield judge("adapter", fault.name, case, fault.checks, before, found.results)


def _loaded(root: Path, case: str) -> Reference:
    style, make = HEALTHY[case]
    base = root / "base"
    if not base.is_dir():
        save_base(base, style)
        save_adapter(base, root / "one", seed=1, config=make())
        save_adapter(base, root / "two", seed=2, config=lora(r=2, lora_alpha=8, target_modules=make().target_modules))
    made = Reference(load_base(base, attn_implementation="eager"), make_workload(VOCAB, 256, greedy_tokens=8))
    for name in ("one", "two"):
        made.attach(name, root / name)
    return made


def _ask(checks: tuple[Any, ...], stage: Stage, context: Any) -> list[CheckResult]:
    found = [c.perform(stage, context, "one") for c in checks if c.of_adapters]
    return found + [c.perform(stage, context, "base") for c in checks if c.of_base]


def model_trials(case: str, root: Path) -> Iterator[Trial]:
    """Plant every fault of a loaded model."""
    before = _flagged(_ask(PYTORCH_CHECKS, Stage.PYTORCH, _loaded(root, case)))
    for fault in MODEL_FAULTS:
        reference = _loaded(root, case)
        fault.plant(reference)
        yield judge("pytorch", fault.name, case, fault.checks, before, _ask(PYTORCH_CHECKS, Stage.PYTORCH, reference))


def graph_trials(case: str, root: Path) -> Iterator[Trial]:
    """Plant every fault of a graph's folder, and of a session that runs it."""
    reference = _loaded(root, case)
    graph = export_graphs(reference, ("one", "two"), root / "graph")[0]
    with opened(Stage.GRAPH, graph, reference) as healthy:
        before = _flagged(_ask(GRAPH_CHECKS, Stage.GRAPH, healthy))
    for fault in GRAPH_FAULTS:
        folder = root / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(graph.folder, folder, ignore=shutil.ignore_patterns("qpc-*"))
        fault.plant(folder)
        yield judge(
            "graph", fault.name, case, fault.checks, before, _run(Graph(folder, graph.fitted), reference, lambda c: c)
        )
    for kind in SESSION_FAULTS:
        run = _run(
            graph, reference, lambda c, kind=kind: dataclasses.replace(c, session=kind.make(c.session), _seen={})
        )  # type: ignore[misc]
        yield judge("session", kind.name, case, kind.checks, before, run)


def _changes(fault: GraphFault, folder: Path) -> bool:
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    fault.plant(folder)
    return any(p.read_bytes() != content for p, content in before.items())


def _run(graph: Graph, reference: Reference, change: Callable[[Candidate], Candidate]) -> list[CheckResult]:
    with opened(Stage.GRAPH, graph, reference) as candidate:
        return _ask(GRAPH_CHECKS, Stage.GRAPH, change(candidate))


def accusations(names: list[str], root: Path) -> Iterator[tuple[str, list[str]]]:
    """Test the files of sound adapters, and the models in PyTorch; yield what fails."""
    for name in names:
        style, make = HEALTHY[name]
        base = root / style
        if not base.is_dir():
            save_base(base, style)
        adapter = save_adapter(base, root / name.replace(" ", "_"), config=make())
        only = ["adapter.*", "pytorch.*"]
        found = testing.run(base, {"one": adapter}, only=only, measure_speed=False, greedy_tokens=4)
        yield name, [f"{r.name}: {r.message}" for r in found.with_outcome(Outcome.FAIL)]


def run(*, quick: bool = False) -> tuple[list[Trial], dict[str, list[str]]]:
    """Plant everything; return the trials and what sound adapters were accused of."""
    torch.set_num_threads(1)
    trials: list[Trial] = []
    groups = ((adapter_trials, ADAPTER_CASES), (model_trials, MODEL_CASES), (graph_trials, GRAPH_CASES))
    for make, cases in groups:
        for case in cases[:1] if quick else cases:
            with tempfile.TemporaryDirectory() as root:
                trials += list(make(case, Path(root)))
    with tempfile.TemporaryDirectory() as root:
        return trials, dict(accusations(list(HEALTHY)[: 3 if quick else None], Path(root)))


def table(trials: list[Trial]) -> str:
    """Return one line for each kind."""
    kinds = sorted({(t.group, t.fault) for t in trials}, key=lambda k: [t.group for t in trials].index(k[0]))
    lines = [f"{'group':<9} {'fault':<45} {'planted':>7} {'caught':>6} {'named':>5}"]
    for group, fault in kinds:
        own = [t for t in trials if (t.group, t.fault) == (group, fault)]
        lines.append(
            f"{group:<9} {fault:<45} {len(own):>7} {sum(t.caught for t in own):>6} {sum(t.named for t in own):>5}"
        )
    return "\n".join(lines)


def main() -> None:
    """Run, and print table, misses and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one architecture, three sound models")
    start = time.perf_counter()
    warnings.simplefilter("ignore")
    trials, accused = run(quick=parser.parse_args().quick)
    print(table(trials))
    for trial in (t for t in trials if not t.named):
        print(
            f"{'misnamed' if trial.caught else 'missed'}: {trial.fault} in {trial.case}; flagged: {', '.join(trial.by) or 'nothing'}"
        )
    for name, messages in accused.items():
        for message in messages:
            print(f"accused: {name}: {message}")
    summary = {
        "kinds": len({(t.group, t.fault) for t in trials}),
        "planted": len(trials),
        "caught_share": round(sum(t.caught for t in trials) / len(trials), 4),
        "named_share": round(sum(t.named for t in trials) / len(trials), 4),
        "sound": len(accused),
        "accused": sum(bool(m) for m in accused.values()),
        "seconds": round(time.perf_counter() - start, 1),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
