# SPDX-License-Identifier: BSD-3-Clause
"""Two ways to run the model, behind one interface, so that both are timed by the same code."""

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch

from QEfficient.runtime.prefill import prefill
from QEfficient.runtime.session import Session
from QEfficient.testing.reference import Reference
from QEfficient.testing.workload import Tokens


class Engine(Protocol):
    """One way to run the model; every row gets the same tokens."""

    def select(self, subject: str) -> None:
        """Choose the adapter, or the base."""

    def resize(self, rows: int) -> None:
        """Run so many rows at once from now on; one at first."""

    def start(self, prompt: Tokens) -> int:
        """Read a prompt into an empty cache and return the next token."""

    def step(self, token: int) -> int:
        """Read one token and return the next."""


class PyTorchEngine:
    """transformers and PEFT, cache on."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._active = contextlib.ExitStack()
        self._cache: Any = None
        self._rows = 1

    def select(self, subject: str) -> None:
        """Choose the adapter, or the base."""
        self._active.close()
        self._active.enter_context(self._reference.selected(subject))

    def close(self) -> None:
        """Leave the model as it was found."""
        self._active.close()

    def resize(self, rows: int) -> None:
        """Run so many rows at once from now on."""
        self._rows = rows

    def start(self, prompt: Tokens) -> int:
        """Read a prompt into an empty cache and return the next token."""
        self._cache = None
        return self._forward(prompt)

    def step(self, token: int) -> int:
        """Read one token and return the next."""
        return self._forward(np.array([token], dtype=np.int64))

    def _forward(self, tokens: Tokens) -> int:
        with torch.no_grad():
            out = self._reference.model(
                input_ids=torch.from_numpy(tokens)[None].expand(self._rows, -1),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._cache = out.past_key_values
        return int(out.logits[0, -1].argmax())


class ProgramEngine:
    """A session of the program."""

    def __init__(self, session: Session, ctx_len: int) -> None:
        self._session = session
        self._position = 0
        self._ctx_len = ctx_len
        self.resize(1)

    def select(self, subject: str) -> None:
        """Choose the adapter, or the base."""
        self._session.set_adapter(subject)

    def resize(self, rows: int) -> None:
        """Run so many rows at once from now on."""
        self._rows = rows
        self._session.allocate(rows, self._ctx_len)

    def start(self, prompt: Tokens) -> int:
        """Read a prompt into an empty cache and return the next token."""
        self._session.reset()
        self._position = len(prompt)
        return int(prefill(self._session, [prompt] * self._rows, chunk_len=len(prompt))[0].argmax())

    def step(self, token: int) -> int:
        """Read one token and return the next."""
        at = np.full((self._rows, 1), self._position)
        logits = self._session.run(np.full_like(at, token), at)
        self._position += 1
        return int(logits[0, -1].argmax())


@contextlib.contextmanager
def fast_attention(model: Any) -> Iterator[None]:
    """Let PyTorch use its fused attention while it is timed; a model that has none stays as it is."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("sdpa")
    except (ValueError, AttributeError, ImportError):
        pass
    try:
        yield
    finally:
        model.set_attn_implementation(before)
