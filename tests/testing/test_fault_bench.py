# SPDX-License-Identifier: BSD-3-Clause
"""A small sample of ``benchmarks/faults.py``: faults of a session on the shared graph, and its bookkeeping."""

import dataclasses

import pytest

from benchmarks.faults import Trial, judge, table
from QEfficient.testing.checks_graph import CHECKS
from QEfficient.testing.graphs import Graph, opened
from QEfficient.testing.reference import Reference
from QEfficient.testing.report import Stage
from tests.testing.planted_adapters import ADAPTER_FAULTS
from tests.testing.planted_graphs import GRAPH_FAULTS, SESSION_FAULTS, SessionFault
from tests.testing.planted_pytorch import MODEL_FAULTS
from tests.testing.planted_third import THIRD_SESSION_FAULTS

SINGLE = [f for f in THIRD_SESSION_FAULTS if f.name == "prompt of one token at the wrong place"]


@pytest.mark.parametrize("fault", [*SESSION_FAULTS, *SINGLE], ids=lambda f: f.name)
def test_fault_of_a_session_is_named(graph: Graph, reference: Reference, fault: SessionFault):
    """Each fault of running is named by a check that is meant for it."""
    names = {c.split(".")[1] for c in fault.checks}
    asked = [c for c in CHECKS if c.name in names]
    assert len(asked) == len(names)
    with opened(Stage.GRAPH, graph, reference) as healthy:
        candidate = dataclasses.replace(healthy, session=fault.make(healthy.session), _seen={})
        found = judge(
            "session",
            fault.name,
            "lora",
            fault.checks,
            set(),
            [c.perform(Stage.GRAPH, candidate, "one") for c in asked],
        )
    assert found.named, found


def test_kinds_are_many_and_have_names_of_their_own():
    """At least 60 kinds of faults are planted, none twice."""
    names = [(type(f).__name__, f.name) for f in (*ADAPTER_FAULTS, *MODEL_FAULTS, *GRAPH_FAULTS, *SESSION_FAULTS)]
    assert len(set(names)) == len(names) >= 60


def test_table_counts():
    """The table has a line for each kind with what was planted, caught and named."""
    trials = [Trial("adapter", "x", "a", True, True, ("b",)), Trial("adapter", "x", "c", True, False, ("d",))]
    assert table(trials).splitlines()[1].split() == ["adapter", "x", "2", "2", "1"]
