# SPDX-License-Identifier: BSD-3-Clause
"""How many planted faults ``qefficient test`` catches, and how many sound models it accuses.

::

    python -m benchmarks.faults            # all: several architectures and methods
    python -m benchmarks.faults --quick    # one architecture, every kind once
    python -m benchmarks.faults --part held-out

A fault is *caught* if a check fails or warns that is not so without it, and *named* if that is a check meant for it.
Held-out faults (tests/testing/planted_held_out.py, planted_second.py and planted_third.py) were written without looking at the checks.
A folder that cannot be opened at all counts as caught and named: the run ends with that reason.
Prints the tables of kinds, the misses, and one JSON line.
"""

import argparse
import dataclasses
import functools
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

import numpy as np
import torch
from transformers import AutoConfig
from transformers.utils import logging

from QEfficient import testing
from QEfficient.contract import Manifest
from QEfficient.errors import ArtifactError, UnsupportedError
from QEfficient.peft.loading import load_base
from QEfficient.runtime.engine import Engine
from QEfficient.runtime.session import OrtSession
from QEfficient.testing.adapter_stage import examine
from QEfficient.testing.candidate import Candidate
from QEfficient.testing.checks_graph import CHECKS as GRAPH_CHECKS
from QEfficient.testing.checks_mixed import CHECKS as MIXED_CHECKS
from QEfficient.testing.checks_pytorch import CHECKS as PYTORCH_CHECKS
from QEfficient.testing.graphs import Graph, export_graphs, opened
from QEfficient.testing.precision import CHECKS as PRECISION_CHECKS
from QEfficient.testing.precision import SAME_BITS, evaluate_rounded
from QEfficient.testing.quality import Row
from QEfficient.testing.reference import Reference
from QEfficient.testing.report import CheckResult, Outcome, Stage
from QEfficient.testing.selection import Selection
from QEfficient.testing.workload import make_workload
from tests.testing.healthy import HEALTHY
from tests.testing.planted_adapters import ADAPTER_FAULTS, Fault
from tests.testing.planted_graphs import GRAPH_FAULTS, SESSION_FAULTS, GraphFault, SessionFault
from tests.testing.planted_held_out import (
    EXPORT_FAULTS,
    HELD_OUT_ADAPTER_FAULTS,
    HELD_OUT_GRAPH_FAULTS,
    HELD_OUT_MODEL_FAULTS,
    HELD_OUT_SESSION_FAULTS,
    ExportFault,
)
from tests.testing.planted_mixed import MIXED_FAULTS, MixedFault
from tests.testing.planted_pytorch import MODEL_FAULTS, ModelFault
from tests.testing.planted_rounded import ROUNDED_FAULTS
from tests.testing.planted_second import (
    SECOND_ADAPTER_FAULTS,
    SECOND_EXPORT_FAULTS,
    SECOND_GRAPH_FAULTS,
    SECOND_MODEL_FAULTS,
    SECOND_SESSION_FAULTS,
)
from tests.testing.planted_third import (
    THIRD_ADAPTER_FAULTS,
    THIRD_EXPORT_FAULTS,
    THIRD_GRAPH_FAULTS,
    THIRD_MODEL_FAULTS,
    THIRD_SESSION_FAULTS,
)
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


def adapter_trials(case: str, root: Path, faults: tuple[Fault, ...] = ADAPTER_FAULTS) -> Iterator[Trial]:
    """Plant every fault of a folder."""
    style, make = HEALTHY[case]
    base = save_base(root / "base", style)
    sound = save_adapter(base, root / "sound", config=make())
    config = AutoConfig.from_pretrained(base)
    before = _flagged(examine("one", sound, str(base), config, Selection()).results)
    for index, fault in enumerate(faults):
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


def model_trials(case: str, root: Path, faults: tuple[ModelFault, ...] = MODEL_FAULTS) -> Iterator[Trial]:
    """Plant every fault of a loaded model."""
    before = _flagged(_ask(PYTORCH_CHECKS, Stage.PYTORCH, _loaded(root, case)))
    for fault in faults:
        reference = _loaded(root, case)
        fault.plant(reference)
        yield judge("pytorch", fault.name, case, fault.checks, before, _ask(PYTORCH_CHECKS, Stage.PYTORCH, reference))


def graph_trials(
    case: str,
    root: Path,
    faults: tuple[GraphFault, ...] = GRAPH_FAULTS,
    running: tuple[SessionFault, ...] = SESSION_FAULTS,
) -> Iterator[Trial]:
    """Plant every fault of a graph's folder, and of a session that runs the graph or the program."""
    reference = _loaded(root, case)
    graph = export_graphs(reference, ("one", "two"), root / "graph")[0]
    before = _flagged(_run(graph, reference))
    for fault in faults:
        folder = root / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(graph.folder, folder, ignore=shutil.ignore_patterns("qpc-*"))
        fault.plant(folder)
        try:
            found = _run(Graph(folder, graph.fitted), reference)
        except ArtifactError as e:
            yield Trial("graph", fault.name, case, True, True, (f"refused: {str(e)[:80]}",))
            continue
        yield judge("graph", fault.name, case, fault.checks, before, found)
    for stage, group in ((Stage.GRAPH, "session"), (Stage.PROGRAM, "program")):
        before = _flagged(_run(graph, reference, stage=stage))
        for kind in running:
            change = functools.partial(_with_session, kind)
            checks = tuple(c.replace("graph.", f"{stage.value}.") for c in kind.checks)
            yield judge(group, kind.name, case, checks, before, _run(graph, reference, change, stage))


def export_trials(case: str, root: Path, faults: tuple[ExportFault, ...] = EXPORT_FAULTS) -> Iterator[Trial]:
    """Test graphs that were exported from a model that is not quite the one given."""
    reference = _loaded(root, case)
    true = export_graphs(reference, ("one", "two"), root / "graph")[0]
    for index, fault in enumerate(faults):
        other = _loaded(root, case)
        fault.alter(other.model)
        folder = export_graphs(other, ("one", "two"), root / f"altered-{index}")[0].folder
        yield judge("export", fault.name, case, fault.checks, set(), _run(Graph(folder, true.fitted), reference))


def rounded_trials(case: str, root: Path, faults: tuple[GraphFault, ...] = ROUNDED_FAULTS) -> Iterator[Trial]:
    """Plant every fault of a program in int8 and in int4, which is judged on text."""
    reference = _loaded(root, case)
    graph = export_graphs(reference, ("one", "two"), root / "graph")[0]
    for precision in ("int8", "int4"):
        with opened(Stage.PROGRAM, graph, reference, precision) as sound:
            before = _flagged(_ask_rounded(sound))
        for fault in faults:
            folder = root / "damaged"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(sound.folder, folder)
            fault.plant(folder)
            session = OrtSession(folder, verify=False)
            for name, tensors in graph.fitted.items():
                session.load_adapter(name, tensors)
            candidate = dataclasses.replace(sound, folder=folder, session=session, _seen={})
            yield judge(precision, fault.name, case, fault.checks, before, _ask_rounded(candidate))


def mixed_trials(case: str, root: Path) -> Iterator[Trial]:
    """Plant every fault of a mixed batch into the engine that runs it."""
    reference = _loaded(root, case)
    graph = export_graphs(reference, ("one", "two"), root / "graph")[0]
    with opened(Stage.PROGRAM, graph, reference) as sound:
        before = _flagged(_ask(MIXED_CHECKS, Stage.PROGRAM, sound))
        for fault in MIXED_FAULTS:

            def planted(*args: Any, fault: MixedFault = fault, **kwargs: Any) -> Engine:
                engine = Engine(*args, **kwargs)
                fault.plant(engine)
                return engine

            candidate = dataclasses.replace(sound, make_engine=planted, mixed={})
            found = _ask(MIXED_CHECKS, Stage.PROGRAM, candidate)
            yield judge("mixed", fault.name, case, fault.checks, before, found)


def _ask_rounded(candidate: Candidate) -> list[CheckResult]:
    random = np.random.default_rng(0)
    rows = [Row(random.integers(0, VOCAB, 32), 8) for _ in range(8)]
    manifest = Manifest.read(candidate.folder)
    found = evaluate_rounded(candidate.reference, candidate.session, manifest, rows, ("base", "one"), lambda name: None)
    exact = tuple(c for c in GRAPH_CHECKS if c.name in SAME_BITS)
    return [*_ask(exact, Stage.PROGRAM, candidate), *_ask(PRECISION_CHECKS, Stage.QUALITY, found)]


def _with_session(kind: SessionFault, candidate: Candidate) -> Candidate:
    return dataclasses.replace(candidate, session=kind.make(candidate.session), _seen={})


def _run(
    graph: Graph,
    reference: Reference,
    change: Callable[[Candidate], Candidate] = lambda c: c,
    stage: Stage = Stage.GRAPH,
) -> list[CheckResult]:
    with opened(stage, graph, reference) as candidate:
        return _ask(GRAPH_CHECKS, stage, change(candidate))


def accusations(names: list[str], root: Path) -> Iterator[tuple[str, list[str]]]:
    """Test sound adapters at every stage; yield what fails."""
    for name in names:
        style, make = HEALTHY[name]
        base = root / style
        if not base.is_dir():
            save_base(base, style)
        adapter = save_adapter(base, root / name.replace(" ", "_"), config=make())
        try:
            found = testing.run(base, {"one": adapter}, measure_speed=False, greedy_tokens=8)
        except UnsupportedError as e:
            print(f"not exported: {name}: {str(e).splitlines()[0]}")
            found = testing.run(base, {"one": adapter}, only=["adapter.*", "pytorch.*"], measure_speed=False)
        yield name, [f"{r.name}: {r.message}" for r in found.with_outcome(Outcome.FAIL)]


Trials = Callable[[str, Path], Iterator[Trial]]
KNOWN: tuple[tuple[Trials, tuple[str, ...]], ...] = (
    (adapter_trials, ADAPTER_CASES),
    (model_trials, MODEL_CASES),
    (graph_trials, GRAPH_CASES),
    (rounded_trials, GRAPH_CASES),
    (mixed_trials, GRAPH_CASES),
)


def _held_out(
    adapters: Any, models: Any, graphs: Any, running: Any, exports: Any
) -> tuple[tuple[Trials, tuple[str, ...]], ...]:
    """Return where the faults of a held-out set are planted."""
    twice = ("lora", "lora on qwen3")
    return (
        (functools.partial(adapter_trials, faults=adapters), twice),
        (functools.partial(model_trials, faults=models), ("lora", "lora on gpt2")),
        (functools.partial(graph_trials, faults=graphs, running=running), twice),
        (functools.partial(export_trials, faults=exports), twice),
    )


HELD_OUT = _held_out(
    HELD_OUT_ADAPTER_FAULTS, HELD_OUT_MODEL_FAULTS, HELD_OUT_GRAPH_FAULTS, HELD_OUT_SESSION_FAULTS, EXPORT_FAULTS
)
SECOND = _held_out(
    SECOND_ADAPTER_FAULTS, SECOND_MODEL_FAULTS, SECOND_GRAPH_FAULTS, SECOND_SESSION_FAULTS, SECOND_EXPORT_FAULTS
)
THIRD = _held_out(
    THIRD_ADAPTER_FAULTS, THIRD_MODEL_FAULTS, THIRD_GRAPH_FAULTS, THIRD_SESSION_FAULTS, THIRD_EXPORT_FAULTS
)


def plant(groups: tuple[tuple[Trials, tuple[str, ...]], ...], *, quick: bool) -> list[Trial]:
    """Plant every fault of some groups in each of their cases, or in the first."""
    torch.set_num_threads(1)
    trials: list[Trial] = []
    for make, cases in groups:
        for case in cases[:1] if quick else cases:
            with tempfile.TemporaryDirectory() as root:
                trials += list(make(case, Path(root)))
    return trials


def accuse(*, quick: bool) -> dict[str, list[str]]:
    """Return what sound adapters are accused of."""
    with tempfile.TemporaryDirectory() as root:
        return dict(accusations(list(HEALTHY)[: 3 if quick else None], Path(root)))


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
    parser.add_argument("--part", choices=("known", "held-out", "second", "third", "sound"), help="only this part")
    options = parser.parse_args()
    start = time.perf_counter()
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    summary: dict[str, Any] = {}
    for part, groups in (("known", KNOWN), ("held-out", HELD_OUT), ("second", SECOND), ("third", THIRD)):
        if options.part in (None, part):
            trials = plant(groups, quick=options.quick)
            print(f"{part}\n{table(trials)}")
            print("\n".join(misses(trials)))
            summary[part] = {
                "kinds": len({(t.group, t.fault) for t in trials}),
                "planted": len(trials),
                "caught_share": round(sum(t.caught for t in trials) / len(trials), 4),
                "named_share": round(sum(t.named for t in trials) / len(trials), 4),
            }
    if options.part in (None, "sound"):
        accused = accuse(quick=options.quick)
        for name, messages in accused.items():
            print("\n".join(f"accused: {name}: {m}" for m in messages), end="\n" if messages else "")
        summary["sound"] = {"tested": len(accused), "accused": sum(bool(m) for m in accused.values())}
    summary |= {
        "seconds": round(time.perf_counter() - start, 1),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
    }
    print(json.dumps(summary))


def misses(trials: list[Trial]) -> list[str]:
    """Return one line for each fault that is not caught, or not named."""
    return [
        f"{'misnamed' if t.caught else 'missed'}: {t.fault} ({t.group}) in {t.case}; flagged: {', '.join(t.by) or 'nothing'}"
        for t in trials
        if not t.named
    ]


if __name__ == "__main__":
    main()
