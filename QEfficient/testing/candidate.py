# SPDX-License-Identifier: BSD-3-Clause
"""One engine under test, the graph or the program, driven by the workload through its session.

The prefill here is written from the graph's contract alone, so that a fault in the runtime's own prefill cannot hide one
in the graph.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from QEfficient.contract import BASE
from QEfficient.runtime.engine import Engine
from QEfficient.testing.compare import Difference, Logits, difference
from QEfficient.testing.loading import Loading
from QEfficient.testing.reference import Reference
from QEfficient.testing.report import Stage
from QEfficient.testing.workload import Tokens, Workload

Tensors = dict[str, npt.NDArray[Any]]


class Session(Protocol):
    """What a test needs of a session."""

    def allocate(self, batch_size: int, ctx_len: int) -> None:
        """Make room for so many rows and positions."""

    def reset(self) -> None:
        """Start new sequences."""

    def run(self, input_ids: Tokens, position_ids: Tokens) -> npt.NDArray[np.float32]:
        """Advance every row; return logits ``(B, 1, V)`` or ``(B, S, V)``."""

    def load_adapter(self, name: str, tensors: Tensors) -> None:
        """Make an adapter known."""

    def set_adapter(self, name: str) -> None:
        """Select an adapter, or ``"base"``."""


@dataclass(slots=True)
class Candidate:
    """One engine, and what it is held against.

    Attributes:
        stage: ``GRAPH`` or ``PROGRAM``.
        folder: Where it lies.
        session: Runs it; adapters are loaded.
        reference: PyTorch + PEFT.
        exported: Adapter tensors found in the graph folder.
        fitted: Adapter tensors made from the adapters' own folders for this graph.
        names: The adapters.
        broken: Why an adapter that lies in the graph folder cannot be used.
        loading: What it took to open the folder and bind the adapters.
        has_base: It can run without an adapter.
        compile_mixed: Compiles the graph to a program that mixes adapters, if it can.
        make_engine: Opens that program to serve.
        mixed: What came of mixed batches, by the adapters in them.
    """

    stage: Stage
    folder: Path
    session: Session
    reference: Reference
    exported: dict[str, Tensors]
    fitted: dict[str, Tensors]
    names: tuple[str, ...]
    broken: dict[str, str] = field(default_factory=dict)
    loading: Loading = field(default_factory=Loading)
    has_base: bool = True
    compile_mixed: Callable[[], Path] | None = None
    make_engine: Callable[..., Engine] = Engine
    mixed: dict[tuple[str, ...], Any] = field(default_factory=dict)
    _seen: dict[tuple[str, str], Difference] = field(default_factory=dict)

    @property
    def workload(self) -> Workload:
        """The tokens that are compared."""
        return self.reference.workload

    def compare(self, scenario: str, subject: str) -> Difference:
        """Run one scenario of :data:`SCENARIOS` and compare it with PyTorch; a repeated question costs nothing."""
        if (scenario, subject) not in self._seen:
            self.session.set_adapter(subject)
            positions = SCENARIOS[scenario](self.session, self.workload)
            base = self.reference.disabled_logits()
            want = base if subject == BASE else self.reference.workload_logits(subject)
            got = np.stack([p.logits for p in positions])
            self._seen[scenario, subject] = difference(
                [p.label for p in positions],
                got,
                np.stack([want[p.row][p.index] for p in positions]),
                None if subject == BASE else np.stack([base[p.row][p.index] for p in positions]),
            )
        return self._seen[scenario, subject]

    def first_logits(self, subject: str) -> Logits:
        """Return the logits after the first prompt, ``(V,)``, with a session that starts anew."""
        self.session.set_adapter(subject)
        self.session.allocate(1, self.workload.ctx_len)
        return prefill(self.session, [self.workload.prompts[0]])[0][-1].logits.copy()

    def greedy(self, subject: str, prompts: list[Tokens], tokens: int) -> list[Tokens]:
        """Return the greedy continuation of each prompt, all in one batch."""
        self.session.set_adapter(subject)
        self.session.allocate(len(prompts), self.workload.ctx_len)
        last = prefill(self.session, prompts, self.workload.chunk)
        chosen = np.array([[row[-1].logits.argmax()] for row in last], dtype=np.int64)
        positions = np.array([[len(p)] for p in prompts], dtype=np.int64)
        out = [chosen]
        for step in range(tokens - 1):
            logits = self.session.run(chosen, positions + step)
            chosen = logits[:, -1].argmax(axis=1)[:, None].astype(np.int64)
            out.append(chosen)
        return list(np.concatenate(out, axis=1))


@dataclass(frozen=True, slots=True)
class Position:
    """Logits of one engine at one attended position of the workload."""

    label: str
    row: int
    index: int
    logits: Logits


def prefill(session: Session, prompts: list[Tokens], chunk: int | None = None) -> list[list[Position]]:
    """Run prompts of different lengths, in one call or in chunks; return what each call said of each row.

    A row that is through repeats its last token at its last position, as the contract asks.
    """
    session.reset()
    size = chunk or max(len(p) for p in prompts)
    said: list[list[Position]] = [[] for _ in prompts]
    for start in range(0, max(len(p) for p in prompts), size):
        ids = np.zeros((len(prompts), size), dtype=np.int64)
        positions = np.full_like(ids, -1)
        for row, prompt in enumerate(prompts):
            first = min(start, len(prompt) - 1)
            part = prompt[first : start + size] if start < len(prompt) else prompt[-1:]
            ids[row, : len(part)] = part
            positions[row, : len(part)] = np.arange(first, first + len(part))
        logits = session.run(ids, positions)
        for row, prompt in enumerate(prompts):
            if start < len(prompt):
                index = int(positions[row].max())
                at = 0 if logits.shape[1] == 1 else index - start
                said[row].append(Position(f"prefill {index}", row, index, logits[row, at].copy()))
    return said


def _prefill(session: Session, workload: Workload) -> list[Position]:
    """The longest prompt, in one call."""
    session.allocate(1, workload.ctx_len)
    return prefill(session, workload.prompts[:1])[0]


def _chunked(session: Session, workload: Workload) -> list[Position]:
    """The longest prompt, in chunks."""
    session.allocate(1, workload.ctx_len)
    return prefill(session, workload.prompts[:1], workload.chunk)[0]


def _decode(session: Session, workload: Workload) -> list[Position]:
    """A prompt of one token, and the longest prompt, then one forced token at a time."""
    session.allocate(1, workload.ctx_len)
    single = prefill(session, [workload.prompts[0][:1]])[0]
    prefill(session, workload.prompts[:1])
    return single + _steps(session, workload, rows=1)


def _ragged(session: Session, workload: Workload) -> list[Position]:
    """All rows in one batch, in chunks, then one forced token at a time."""
    session.allocate(len(workload.rows), workload.ctx_len)
    said = prefill(session, workload.prompts, workload.chunk)
    return [row[-1] for row in said] + _steps(session, workload, rows=len(workload.rows))


def _steps(session: Session, workload: Workload, rows: int) -> list[Position]:
    lengths = np.array(workload.prompt_lengths[:rows], dtype=np.int64)[:, None]
    said = []
    for step in range(workload.decode_steps):
        tokens = np.stack([workload.rows[r][n : n + 1] for r, n in enumerate(lengths[:, 0] + step)])
        logits = session.run(tokens, lengths + step)
        said += [Position(f"decode {step}", r, int(lengths[r, 0]) + step, logits[r, -1].copy()) for r in range(rows)]
    return said


SCENARIOS = {"prefill": _prefill, "chunked": _chunked, "decode": _decode, "ragged": _ragged}
"""How the workload is run; each returns the attended positions whose logits are compared."""
