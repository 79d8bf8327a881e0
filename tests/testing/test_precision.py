# SPDX-License-Identifier: BSD-3-Clause
"""Programs of rounded weights judged on text, and answers counted."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from QEfficient import testing
from QEfficient.contract import Manifest
from QEfficient.errors import ConfigError
from QEfficient.runtime.session import OrtSession
from QEfficient.testing.graphs import Graph, opened
from QEfficient.testing.precision import CHECKS, evaluate_rounded
from QEfficient.testing.quality import CHECKS as QUALITY_CHECKS
from QEfficient.testing.quality import Quality, Row, evaluate
from QEfficient.testing.reference import Reference
from QEfficient.testing.report import CheckResult, Outcome, Stage
from tests.testing.planted_graphs import GraphFault
from tests.testing.planted_rounded import HALVES_FAULTS, ROUNDED_FAULTS
from tests.tiny import VOCAB


def rows() -> list[Row]:
    """Return seeded random rows: what is judged is the program, not the text."""
    random = np.random.default_rng(0)
    return [Row(random.integers(0, VOCAB, 24), 8, asks=True) for _ in range(6)]


def judge(folder: Path, graph: Graph, reference: Reference) -> list[CheckResult]:
    """Judge the program in a folder, with the base and one adapter."""
    session = OrtSession(folder, verify=False)
    for name, tensors in graph.fitted.items():
        session.load_adapter(name, tensors)
    manifest = Manifest.read(folder)
    found = evaluate_rounded(reference, session, manifest, rows(), ("base", "one"), lambda name: None)
    return [CHECKS[0].perform(Stage.QUALITY, found, name) for name in ("base", "one")]


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_rounding_is_all_that_differs(graph: Graph, reference: Reference, precision: str):
    """A sound program is as far from PyTorch with the same rounded weights as rounding activations takes it; weights come back."""
    before = {n: p.data_ptr() for n, p in reference.model.named_parameters()}
    with opened(Stage.PROGRAM, graph, reference, precision) as sound:
        found = judge(sound.folder, graph, reference)
    assert [r.outcome is not Outcome.FAIL and (r.measured or 9) < 1.5 for r in found] == [True, True], found
    assert {n: p.data_ptr() for n, p in reference.model.named_parameters()} == before


@pytest.mark.usefixtures("library")  # the faults are planted into strips
@pytest.mark.parametrize("fault", ROUNDED_FAULTS[:4], ids=lambda f: f.name)
def test_damaged_numbers_are_found(graph: Graph, reference: Reference, tmp_path: Path, fault: GraphFault):
    """What is more than rounding fails, in int4 too, where rounding itself moves every token."""
    with opened(Stage.PROGRAM, graph, reference, "int4") as sound:
        folder = Path(shutil.copytree(sound.folder, tmp_path / "program"))
    fault.plant(folder)
    assert Outcome.FAIL in {r.outcome for r in judge(folder, graph, reference)}


@pytest.mark.parametrize("fault", HALVES_FAULTS, ids=lambda f: f.name)
def test_damaged_halves_are_found(graph: Graph, reference: Reference, tmp_path: Path, fault: GraphFault):
    """A program in bfloat16 gives what PyTorch gives with those weights, so that little is a fault."""
    with opened(Stage.PROGRAM, graph, reference, "bf16") as sound:
        folder = Path(shutil.copytree(sound.folder, tmp_path / "program"))
    fault.plant(folder)
    assert Outcome.FAIL in {r.outcome for r in judge(folder, graph, reference)}


def test_precision_needs_text():
    """A rounded program is judged on text, so text is asked for; other names are refused."""
    with pytest.raises(ConfigError, match="give --eval as well"):
        testing.run("base", {"one": "one"}, precision="int4")
    with pytest.raises(ConfigError, match="unknown precision 'int5'"):
        testing.run("base", {"one": "one"}, precision="int5")


def test_answers_are_those_of_greedy_decoding(reference: Reference):
    """An answer that greedy decoding gives is counted, another is not; losing what the base could is said."""
    prompt = rows()[0].tokens[:8]
    tokens = list(prompt)
    for _ in range(4):
        tokens.append(int(reference.logits("one", np.array(tokens))[-1].argmax()))
    right, wrong = np.array(tokens), np.array([*tokens[:-1], (tokens[-1] + 1) % VOCAB])
    found = evaluate(
        reference, [Row(right, 8, asks=True), Row(wrong, 8, asks=True), Row(right, 1)], ("base", "one"), lambda n: None
    )
    assert found.answers["one"] == [True, False]
    check = next(c for c in QUALITY_CHECKS if c.name == "answers")
    lost = Quality({}, [], {"base": [True] * 20, "one": [False] * 20})
    assert check.ask(lost, "one").outcome is Outcome.WARN
