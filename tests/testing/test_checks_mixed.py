# SPDX-License-Identifier: BSD-3-Clause
"""Mixed batches through the engine: sound ones pass, each planted fault is named."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from QEfficient.peft.loading import load_base
from QEfficient.runtime.engine import Engine
from QEfficient.testing.candidate import Candidate
from QEfficient.testing.checks_mixed import CHECKS
from QEfficient.testing.graphs import Graph, export_graphs, opened
from QEfficient.testing.reference import Reference
from QEfficient.testing.report import CheckResult, Outcome, Stage
from QEfficient.testing.workload import make_workload
from tests.testing.conftest import Folders
from tests.testing.planted_mixed import MIXED_FAULTS, MixedFault
from tests.tiny import VOCAB, lora, save_adapter, save_base

FAST = (
    "a row keeps its first adapter",
    "last rank masked out",
    "running requests get the new version",
    "last row one position early",
    "who moves loses the newest position",
    "prompt being read does not move along",
    "prefix without its last position",
)


def ask(candidate: Candidate, subject: str) -> CheckResult:
    """Perform the check."""
    return CHECKS[0].perform(Stage.PROGRAM, candidate, subject)


def test_a_sound_mixed_batch_passes(graph: Graph, reference: Reference):
    """Base and adapters of different ranks answer in one batch as PyTorch does; one run answers for all of them."""
    with opened(Stage.PROGRAM, graph, reference) as candidate:
        found = [ask(candidate, name) for name in ("one", "two", "base")]
    assert [r.outcome for r in found] == [Outcome.PASS] * 3, found
    assert all(r.measured is not None and r.measured < 1e-5 for r in found)
    assert [r.facts["requests"] for r in found] == [4, 4, 4]
    assert list(candidate.mixed) == [("one", "two")]


SLOW = [pytest.param(f, marks=pytest.mark.slow, id=f.name) for f in MIXED_FAULTS if f.name not in FAST]


@pytest.mark.parametrize("fault", [*(pytest.param(f, id=f.name) for f in MIXED_FAULTS if f.name in FAST), *SLOW])
def test_fault_of_a_mixed_batch_is_named(graph: Graph, reference: Reference, fault: MixedFault):
    """Each makes the check of an adapter or of the base fail, with a message that says what to do."""

    def planted(*args: Any, **kwargs: Any) -> Engine:
        engine = Engine(*args, **kwargs)
        fault.plant(engine)
        return engine

    with opened(Stage.PROGRAM, graph, reference) as sound:
        candidate = dataclasses.replace(sound, make_engine=planted, mixed={})
        failed = [r for n in ("one", "two", "base") if (r := ask(candidate, n)).outcome is Outcome.FAIL]
    assert failed
    assert "requests in one batch with 2 adapters and the base are wrong. One w" in failed[0].message
    assert failed[0].message.endswith("compile without `mixed`: an engine then makes one call for each adapter.")


def test_the_message_says_whose_answer_it_is(graph: Graph, reference: Reference):
    """A row that began with what another adapter left of its prompt is said to be that adapter's."""
    fault = next(f for f in MIXED_FAULTS if f.name == "prefix of another adapter")

    def planted(*args: Any, **kwargs: Any) -> Engine:
        engine = Engine(*args, **kwargs)
        fault.plant(engine)
        return engine

    with opened(Stage.PROGRAM, graph, reference) as sound:
        found = ask(dataclasses.replace(sound, make_engine=planted, mixed={}), "base")
    assert "much nearer to what 'two' answers" in found.message


def test_an_engine_that_ends_a_request_early_is_named(graph: Graph, reference: Reference):
    """A missing token is infinitely wrong, and the message says how many came."""

    def planted(*args: Any, **kwargs: Any) -> Engine:
        engine = Engine(*args, **kwargs)
        submit = engine.submit
        engine.submit = lambda r: submit(dataclasses.replace(r, max_new_tokens=r.max_new_tokens - 1))  # type: ignore[method-assign]
        return engine

    with opened(Stage.PROGRAM, graph, reference) as sound:
        found = ask(dataclasses.replace(sound, make_engine=planted, mixed={}), "one")
    assert found.outcome is Outcome.FAIL
    assert "got 7 tokens of 8; it ended as 'length'" in found.message


def test_one_adapter_alone_is_mixed_with_the_base(folders: Folders, tmp_path: Path):
    """With one adapter, what is replaced is an adapter that changes nothing."""
    made = Reference(load_base(folders.base, attn_implementation="eager"), make_workload(VOCAB, 256, greedy_tokens=8))
    made.attach("one", folders.one)
    with opened(Stage.PROGRAM, export_graphs(made, ("one",), tmp_path)[0], made) as candidate:
        assert ask(candidate, "one").outcome is Outcome.PASS
        assert ask(candidate, "base").outcome is Outcome.PASS


@pytest.mark.slow
def test_a_short_context_is_enough(tmp_path: Path):
    """A base with 16 positions is asked fewer tokens, and not accused."""
    base = save_base(tmp_path / "base")
    config = base / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 256', '"max_position_embeddings": 16'))
    made = Reference(load_base(base, attn_implementation="eager"), make_workload(VOCAB, 16))
    for seed in range(1, 4):
        made.attach(f"a{seed}", save_adapter(base, tmp_path / f"{seed}", seed=seed))
    with opened(Stage.PROGRAM, export_graphs(made, ("a1", "a2", "a3"), tmp_path / "graph")[0], made) as candidate:
        found = [ask(candidate, name) for name in ("a1", "a2", "a3", "base")]
    assert [r.outcome for r in found] == [Outcome.PASS] * 4, [r.message for r in found]


@pytest.mark.slow
def test_many_adapters_take_turns(folders: Folders, tmp_path: Path):
    """Adapters beyond six are asked in a batch of their own."""
    made = Reference(load_base(folders.base, attn_implementation="eager"), make_workload(VOCAB, 256, greedy_tokens=8))
    names = tuple(f"a{i}" for i in range(7))
    for seed, name in enumerate(names):
        made.attach(name, save_adapter(folders.base, tmp_path / name, seed=seed, config=lora(r=1 + seed % 3)))
    with opened(Stage.PROGRAM, export_graphs(made, names, tmp_path / "graph")[0], made) as candidate:
        found = [ask(candidate, name) for name in ("a0", "a6")]
    assert [r.outcome for r in found] == [Outcome.PASS] * 2, [r.message for r in found]
    assert [len(group) for group in candidate.mixed] == [6, 1]


def test_what_cannot_be_mixed_is_skipped(folders: Folders, tmp_path: Path):
    """DoRA's norms depend on the adapter, so its rows are grouped; a graph is not asked."""
    adapter = save_adapter(folders.base, tmp_path / "dora", config=lora(use_dora=True))
    made = Reference(load_base(folders.base, attn_implementation="eager"), make_workload(VOCAB, 256, greedy_tokens=8))
    made.attach("dora", adapter)
    graph = export_graphs(made, ("dora",), tmp_path / "graph")[0]
    with opened(Stage.PROGRAM, graph, made) as candidate:
        found = ask(candidate, "dora")
    assert found.outcome is Outcome.SKIP
    assert "an engine makes one call for each adapter" in found.message
    assert len(list(graph.folder.glob("qpc-*"))) == 1  # known without compiling another program
    with opened(Stage.GRAPH, graph, made) as candidate:
        assert ask(candidate, "dora").message == "Only of a program that was compiled here."
