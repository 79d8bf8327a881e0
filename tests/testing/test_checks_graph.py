# SPDX-License-Identifier: BSD-3-Clause
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from QEfficient.runtime.session import OrtSession
from QEfficient.testing.candidate import Candidate
from QEfficient.testing.checks_graph import CHECKS
from QEfficient.testing.graphs import Graph, opened
from QEfficient.testing.reference import Reference
from QEfficient.testing.report import CheckResult, Outcome, Stage
from QEfficient.testing.workload import Tokens
from tests.testing.faults import copied, scale_weight


def ask(name: str, candidate: Candidate, subject: str = "one") -> CheckResult:
    """Perform one check."""
    return next(c for c in CHECKS if c.name == name).perform(candidate.stage, candidate, subject)


@pytest.mark.parametrize("subject", ["base", "one", "two"])
def test_healthy_engine_passes(candidate: Candidate, subject: str):
    """No check accuses the graph or the program of a healthy model."""
    asked = [c for c in CHECKS if (c.of_base if subject == "base" else c.of_adapters)]
    found = [c.perform(candidate.stage, candidate, subject) for c in asked]
    assert [r.message for r in found if r.outcome is not Outcome.PASS] == []
    assert all(r.measured < 1e-5 for r in found if r.unit == "of range" and r.measured is not None)


class Faulty:
    """A session with one fault; everything else goes to the healthy one."""

    def __init__(self, session: Any) -> None:
        self.session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run(self, ids: Tokens, positions: Tokens) -> np.ndarray:
        """Run without a fault."""
        return self.session.run(ids, positions)


class OneLogitOff(Faulty):
    """One logit of every call is off by a thousandth of the range."""

    def run(self, ids: Tokens, positions: Tokens) -> np.ndarray:
        """Run with the fault."""
        logits = self.session.run(ids, positions)
        logits[..., 7] += 1e-3 * np.ptp(logits)
        return logits


class NotFinite(Faulty):
    """Every call returns NaN."""

    def run(self, ids: Tokens, positions: Tokens) -> np.ndarray:
        """Run with the fault."""
        return np.full_like(self.session.run(ids, positions), np.nan)


class ChunkForgetsCache(Faulty):
    """A call of several tokens starts with an empty cache."""

    def run(self, ids: Tokens, positions: Tokens) -> np.ndarray:
        """Run with the fault."""
        if ids.shape[1] > 1:
            self.session.reset()
        return self.session.run(ids, positions)


class DecodeOneLate(Faulty):
    """A decoded token is written one position too late."""

    def run(self, ids: Tokens, positions: Tokens) -> np.ndarray:
        """Run with the fault."""
        return self.session.run(ids, positions + 1 if ids.shape[1] == 1 else positions)


class RowsMixed(Faulty):
    """Rows of a batch come back in another order."""

    def run(self, ids: Tokens, positions: Tokens) -> np.ndarray:
        """Run with the fault."""
        return self.session.run(ids, positions)[::-1]


class SecondChoice(Faulty):
    """Decoding gives PyTorch's second choice."""

    def run(self, ids: Tokens, positions: Tokens) -> np.ndarray:
        """Run with the fault."""
        logits = self.session.run(ids, positions)
        if ids.shape[1] == 1:
            for row in logits[:, -1]:
                row[row.argmax()] = row.min()
        return logits


class NeverSwitches(Faulty):
    """Selecting an adapter does nothing after the first time."""

    done = False

    def set_adapter(self, name: str) -> None:
        """Select with the fault."""
        if not self.done:
            self.session.set_adapter(name)
        self.done = True


class AlwaysBase(Faulty):
    """No adapter is ever applied."""

    def set_adapter(self, name: str) -> None:
        """Select with the fault."""
        self.session.set_adapter("base")


class Remembers(Faulty):
    """Something of every call stays in the next."""

    memory = 0.0

    def run(self, ids: Tokens, positions: Tokens) -> np.ndarray:
        """Run with the fault."""
        self.memory += 1e-6
        return self.session.run(ids, positions) + np.float32(self.memory)


class SlotKeeps(Faulty):
    """A slot that starts again sees something of what it held."""

    used = False

    def allocate(self, batch_size: int, ctx_len: int) -> None:
        """Allocate; the slots are fresh."""
        self.used = False
        self.session.allocate(batch_size, ctx_len)

    def run(self, ids: Tokens, positions: Tokens) -> np.ndarray:
        """Run with the fault."""
        logits = self.session.run(ids, positions)
        if self.used and (positions[:, 0] == 0).any():
            logits = logits + 1e-2 * np.ptp(logits) * (np.arange(logits.shape[-1]) % 2).astype(np.float32)
        self.used = True
        return logits


class LosesStart(Faulty):
    """Beyond 100 positions the beginning is forgotten, as with a window that the base does not have."""

    def run(self, ids: Tokens, positions: Tokens) -> np.ndarray:
        """Run with the fault."""
        if positions.max() > 100:
            for state in self.session._states.values():
                state[:, :, :50] = 0
        return self.session.run(ids, positions)


class KeysRotatedOn(Faulty):
    """The rotary embedding counts from one."""

    def run(self, ids: Tokens, positions: Tokens) -> np.ndarray:
        """Run with the fault."""
        logits = self.session.run(ids, positions)
        for name, state in self.session._states.items():
            if name.startswith("past_key"):
                state[...] = np.roll(state, 1, axis=-1)
        return logits


@pytest.mark.parametrize(
    ("fault", "check", "says"),
    [
        (OneLogitOff, "prefill", r"differ from PyTorch by (0.00\d+|\de-[34]) of their range at prefill 47 \(token 7\)"),
        (OneLogitOff, "ragged", "36 of 36 positions are off"),
        (NotFinite, "prefill", "not finite"),
        (NotFinite, "greedy", "not a near-tie"),
        (ChunkForgetsCache, "chunked", "2 of 3 positions are off"),
        (DecodeOneLate, "decode", "9 of 9 positions are off"),
        (RowsMixed, "ragged", "positions are off"),
        (SecondChoice, "greedy", "row 0, token 1 is .* not a near-tie"),
        (SecondChoice, "greedy_batch", "28 of 32 tokens are not PyTorch's"),
        (RowsMixed, "greedy_batch", "not a near-tie"),
        (NeverSwitches, "switching", "changes nothing"),
        (Remembers, "switching", "stays behind"),
        (SecondChoice, "distribution", "nats from PyTorch's at"),
        (RowsMixed, "neighbours", "leak into each other"),
        (SlotKeeps, "slots", "a used slot"),
        (LosesStart, "long", "which fill the cache"),
        (KeysRotatedOn, "layers", r"layer 0 key is the first that differs"),
        (AlwaysBase, "effect", "none of the adapter's effect arrives"),
        (AlwaysBase, "prefill", "The base agrees, so look at the adapter"),
    ],
)
def test_fault_is_found(graph: Graph, reference: Reference, fault: type[Faulty], check: str, says: str):
    """Each fault of a session fails the check that is there for it, with the right reason."""
    with opened(Stage.GRAPH, graph, reference) as healthy:
        found = ask(check, dataclasses.replace(healthy, session=fault(healthy.session), _seen={}))
    assert found.outcome is Outcome.FAIL
    assert re.search(says, found.message), found.message


def test_padding_behind_a_row_is_not_compared(graph: Graph, reference: Reference):
    """A graph that writes garbage under padding, which no token attends to, is healthy."""
    with opened(Stage.GRAPH, graph, reference) as healthy:
        noisy = dataclasses.replace(healthy, session=PaddingNoise(healthy.session), _seen={})
        assert ask("ragged", noisy).outcome is Outcome.PASS


class PaddingNoise(Faulty):
    """What stands under padding is another token."""

    def run(self, ids: Tokens, positions: Tokens) -> np.ndarray:
        """Run with the fault."""
        return self.session.run(np.where(positions < 0, 5, ids), positions)


def swap(graph: Path) -> None:
    """Swap the two exported adapters."""
    one, two = (graph / "adapters" / f"{n}.safetensors" for n in ("one", "two"))
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(kept)


def edit(graph: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Change tensors of the exported adapter ``one``."""
    path = graph / "adapters" / "one.safetensors"
    with safe_open(str(path), framework="np") as f:
        metadata = f.metadata()
    tensors = {k: v.copy() for k, v in load_file(path).items()}
    change(tensors)
    save_file(tensors, str(path), metadata=metadata)


def scale(tensors: dict[str, np.ndarray]) -> None:
    """Halve every scaling, as an adapter whose lora_alpha was doubled after the export."""
    for key in tensors:
        if key.endswith(".scaling"):
            tensors[key] = np.asarray(tensors[key] / 2)


def layers(tensors: dict[str, np.ndarray]) -> None:
    """Swap the tensors of layers 0 and 1."""
    for key in [k for k in tensors if ".layers.0." in k]:
        other = key.replace(".layers.0.", ".layers.1.")
        tensors[key], tensors[other] = tensors[other], tensors[key]


@pytest.mark.parametrize(
    ("fault", "says", "gain"),
    [
        (swap, "holds the tensors of 'two': the two were swapped", None),
        (lambda g: edit(g, scale), r"scales the adapter by 1, its configuration now says 2", 0.5),
        (lambda g: edit(g, layers), "tensors differ from the adapter's folder, first base_model", None),
    ],
    ids=["swapped", "alpha", "layers"],
)
def test_exported_adapter_that_is_another(
    graph: Graph, reference: Reference, tmp_path: Path, fault: Callable[[Path], None], says: str, gain: float | None
):
    """Exported tensors that are not the adapter's fail by their bits, and by what they do to the answers."""
    folder = copied(graph.folder, tmp_path)
    fault(folder)
    with opened(Stage.GRAPH, Graph(folder, graph.fitted), reference) as candidate:
        tensors, effect, prefill = (ask(n, candidate) for n in ("tensors", "effect", "prefill"))
    assert [r.outcome for r in (tensors, effect, prefill)] == [Outcome.FAIL] * 3
    assert says in tensors.message
    assert effect.measured is not None
    assert effect.measured > 0.1
    if gain is not None:  # the effect is not linear in the scaling, so about half of it arrives
        assert abs(float(effect.facts["share of the effect that arrives"]) - gain) < 0.2


def test_exported_adapter_that_cannot_be_read(graph: Graph, reference: Reference, tmp_path: Path):
    """A truncated adapter in the graph folder fails its check and names the file."""
    folder = copied(graph.folder, tmp_path)
    path = folder / "adapters" / "one.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with opened(Stage.GRAPH, Graph(folder, graph.fitted), reference) as candidate:
        found = ask("tensors", candidate)
    assert found.outcome is Outcome.FAIL
    assert "one.safetensors" in found.message


@pytest.mark.parametrize("stage", [Stage.GRAPH, Stage.PROGRAM])
def test_changed_weight_fails(graph: Graph, reference: Reference, tmp_path: Path, stage: Stage):
    """One weight tensor that is 5 % larger fails by its digest, and in the logits of the base."""
    folder = copied(graph.folder, tmp_path)
    path = scale_weight(folder, "layers.1.mlp.up_proj.weight")
    with opened(stage, Graph(folder, graph.fitted), reference) as candidate:
        logits, integrity = ask("prefill", candidate, "base"), ask("integrity", candidate, "base")
    assert logits.outcome is Outcome.FAIL
    assert logits.measured is not None
    assert 1e-3 < logits.measured < 0.2
    assert "The base itself is wrong" in logits.message
    if stage is Stage.GRAPH:
        assert integrity.outcome is Outcome.FAIL
        assert path.name in integrity.message


def test_a_near_tie_is_not_accused(candidate: Candidate):
    """A token that PyTorch ranks equal within the tolerance passes, and the message says so."""
    tied = dataclasses.replace(candidate, reference=Tied(candidate.reference), _seen={})
    found = ask("greedy", tied)
    assert found.outcome is Outcome.PASS
    assert "near-ties" in found.message
    assert found.facts["near-ties"] == 8


class Tied:
    """PyTorch, with another token a hair above its choice."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.judged: dict[tuple[str, bytes], Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reference, name)

    def logits(self, subject: str, tokens: Tokens, keep: int | None = None) -> np.ndarray:
        """Return logits whose second choice has become the first by a rounding error."""
        logits = self.reference.logits(subject, tokens, keep).copy()
        for row in logits:
            row[np.argsort(row)[-2]] = row.max() + 1e-5 * np.ptp(row)
        return logits


def test_check_that_cannot_run_does_not_pass(candidate: Candidate):
    """A session that raises fails the check with the error's text, and takes nothing along."""
    found = ask("prefill", dataclasses.replace(candidate, session=Raises(candidate.session), _seen={}))
    assert found.outcome is Outcome.FAIL
    assert "could not be carried out: RuntimeError: no kernel" in found.message


class Raises(Faulty):
    """Every call raises."""

    def run(self, ids: Tokens, positions: Tokens) -> np.ndarray:
        """Run with the fault."""
        raise RuntimeError("no kernel")


def test_damaged_graph_is_not_compiled_into_itself(graph: Graph, reference: Reference, tmp_path: Path):
    """The program of a damaged graph goes to a temporary folder, so that nothing wrong stays behind."""
    folder = copied(graph.folder, tmp_path)
    scale_weight(folder, "layers.1.mlp.up_proj.weight")
    with opened(Stage.PROGRAM, Graph(folder, graph.fitted), reference) as candidate:
        assert isinstance(candidate.session, OrtSession)
        assert folder not in candidate.folder.parents
    assert not list(folder.glob("qpc-*"))
