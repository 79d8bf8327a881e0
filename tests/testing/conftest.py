# SPDX-License-Identifier: BSD-3-Clause
"""A tiny Llama with two LoRA adapters on disk, in PyTorch, and exported once."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from QEfficient.peft.loading import load_base
from QEfficient.testing.candidate import Candidate
from QEfficient.testing.graphs import Graph, export_graphs, opened
from QEfficient.testing.reference import Reference
from QEfficient.testing.report import Stage
from QEfficient.testing.workload import make_workload
from tests.tiny import VOCAB, lora, save_adapter, save_base


@dataclass(frozen=True)
class Folders:
    """Where base and adapters lie."""

    base: Path
    one: Path
    two: Path

    def copy(self, folder: Path) -> "Folders":
        """Return a copy that a test may damage."""
        return Folders(*(Path(shutil.copytree(p, folder / p.name)) for p in (self.base, self.one, self.two)))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Let PyTorch use one thread: for models this small more of them only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Write a base and two adapters of different rank and scaling."""
    root = tmp_path_factory.mktemp("models")
    base = save_base(root / "base")
    one = save_adapter(base, root / "one", seed=1)
    two = save_adapter(base, root / "two", seed=2, config=lora(r=2, lora_alpha=8))
    return Folders(base, one, two)


@pytest.fixture(scope="session")
def reference(folders: Folders) -> Reference:
    """Load base and adapters in PyTorch; tests must not change it."""
    made = Reference(load_base(folders.base, attn_implementation="eager"), make_workload(VOCAB, 256, greedy_tokens=8))
    made.attach("one", folders.one)
    made.attach("two", folders.two)
    return made


@pytest.fixture(scope="session")
def graph(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """Export the two adapters."""
    return export_graphs(reference, ("one", "two"), tmp_path_factory.mktemp("graphs") / "tiny")[0]


@pytest.fixture(params=[Stage.GRAPH, Stage.PROGRAM], ids=str)
def candidate(request: pytest.FixtureRequest, graph: Graph, reference: Reference) -> Iterator[Candidate]:
    """Open the graph, and the program."""
    with opened(request.param, graph, reference) as made:
        yield made
