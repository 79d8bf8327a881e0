# SPDX-License-Identifier: BSD-3-Clause
"""Who sits in which row of the cache.

Rows that decode come first, the row that takes its prompt is the next one: what is idle costs nothing.
Knows rows and calls of the session; knows neither threads nor the queue.
"""

from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from QEfficient.errors import ConfigError
from QEfficient.runtime.prefix import Prefixes
from QEfficient.runtime.requests import Stream
from QEfficient.runtime.residents import Resident
from QEfficient.runtime.sampling import Chooser
from QEfficient.runtime.slots import SlotSession

Array = npt.NDArray[Any]

_SHORTEST_PREFIX = 8
"""Tokens: to keep fewer saves nothing."""


class Seat:
    """A request on its way: waiting, taking its prompt, decoding."""

    __slots__ = ("chooser", "copied", "length", "produced", "prompt", "request", "resident", "stream", "taken", "token")

    def __init__(self, stream: Stream, resident: Resident) -> None:
        self.stream, self.request, self.resident = stream, stream.request, resident
        self.prompt = np.asarray(self.request.prompt_ids, np.int64)
        self.chooser = Chooser(self.request)
        self.length = 0  # positions of the cache that are filled
        self.taken = -1  # tokens of the prompt among them; -1: it has not begun
        self.copied = 0  # tokens of the prompt that were not computed
        self.produced = 0
        self.token = -1  # produced last, not yet in the cache


class Batch:
    """The rows of a session.

    Args:
        session: Its cache is allocated.
        rows: Of the cache.
        chunk_len: Most prompt tokens in one call.
        prefix_bytes: Most bytes of prefixes to keep; 0: none.
    """

    def __init__(self, session: SlotSession, rows: int, chunk_len: int, prefix_bytes: int) -> None:
        for name, size, least in (("chunk_len", chunk_len, 1), ("prefix_bytes", prefix_bytes, 0)):
            if size < least:
                raise ConfigError(f"{name} must be at least {least}, not {size}")
        self.rows, self.decoding = rows, list[Seat]()  # of rows 0, 1, 2, ...
        self.filling: Seat | None = None  # of the row behind them
        self.prefixes = Prefixes(prefix_bytes) if prefix_bytes else None
        self._session, self._chunk_len = session, chunk_len

    @property
    def active(self) -> int:
        """Rows in use."""
        return len(self.decoding) + (self.filling is not None)

    def fill(self) -> tuple[int, Array | None]:
        """Take one chunk of the filling row's prompt.

        Returns:
            Prompt tokens computed, and the logits ``(1, V)`` if those were the last; the row decodes then.
        """
        seat, row = self.filling, len(self.decoding)
        if seat is None:
            return 0, None
        if seat.taken < 0:
            self._begin(seat, row)
        part = seat.prompt[seat.taken : seat.taken + self._chunk_len]
        positions = seat.length + np.arange(len(part))
        logits = self._session.run_slots(row, part[None], positions[None], [seat.resident.version])
        seat.length += len(part)
        seat.taken += len(part)
        if seat.taken < len(seat.prompt):
            return len(part), None
        self._keep(seat, row)
        return len(part), logits

    def step(self) -> Array:
        """Advance every row that decodes by a token; return their logits ``(B, V)``."""
        seats = self.decoding
        ids = np.array([[s.token] for s in seats])
        positions = np.array([[s.length] for s in seats])
        logits = self._session.run_slots(0, ids, positions, [s.resident.version for s in seats])
        for seat in seats:
            seat.length += 1
        return logits

    def leave(self, row: int) -> Seat:
        """Free a row: the last row that decodes takes its place, and the one behind that moves up."""
        seat, last = self.decoding[row], self.decoding[-1]
        end = len(self.decoding) - 1
        if row != end:
            self._session.copy_row(end, row, last.length)
            self.decoding[row] = last
        self.decoding.pop()
        if self.filling is not None:
            self._session.copy_row(end + 1, end, self.filling.length)
        return seat

    def group(self) -> None:
        """Without mixed calls, put rows of one adapter side by side: a call takes as many of them as stand together."""
        if self._session.mixed:
            return
        order = sorted(range(len(self.decoding)), key=lambda row: self.decoding[row].resident.version)
        if order != list(range(len(order))):
            self._session.permute(order, max(s.length for s in self.decoding))
            self.decoding = [self.decoding[row] for row in order]

    def clear(self) -> list[Seat]:
        """Free all rows; return who sat there."""
        seats = [*self.decoding, *([self.filling] if self.filling is not None else [])]
        self.decoding, self.filling = [], None
        return seats

    def _begin(self, seat: Seat, row: int) -> None:
        """Put into a row what needs no computing: a prefix, or the adapter's virtual tokens."""
        resident = seat.resident
        if self.prefixes is not None:
            seat.copied = self.prefixes.restore(self._session, row, resident.version, seat.prompt)
        if not seat.copied:
            self._session.begin_row(row, resident.version)
        seat.taken, seat.length = seat.copied, resident.virtual_tokens + seat.copied

    def _keep(self, seat: Seat, row: int) -> None:
        """Keep a prompt for those that begin like it, if at least half of it was new: memory is for what differs."""
        if self.prefixes is None or len(seat.prompt) < max(_SHORTEST_PREFIX, 2 * seat.copied):
            return
        virtual = seat.resident.virtual_tokens
        with suppress(ConfigError):  # longer than all prefixes may be
            self.prefixes.keep(self._session, row, seat.resident.version, seat.prompt, virtual_tokens=virtual)
