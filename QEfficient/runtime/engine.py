# SPDX-License-Identifier: BSD-3-Clause
"""Continuous batching: requests join and leave a running batch at any token, each with its own adapter.

Knows token ids; knows no text, no HTTP and no PyTorch. One thread owns the session. In each turn it takes at most one chunk of one
prompt, then one token for every row that decodes, so a long prompt never stops the others for more than a chunk.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from QEfficient.errors import ConfigError, QueueFullError
from QEfficient.runtime.batch import Batch, Seat
from QEfficient.runtime.requests import Request, Stream, check
from QEfficient.runtime.residents import Residents
from QEfficient.runtime.slots import SlotSession
from QEfficient.runtime.stats import Stats
from QEfficient.runtime.waiting import FairQueue

Array = npt.NDArray[Any]


class Engine:
    """Runs many requests at a time on one program.

    Args:
        program: A program folder; compiled with ``mixed``, its rows may run with different adapters in one call.
        slots: Most requests that run at a time.
        ctx_len: Most positions of a request, prompt and new tokens together.
        queue_len: Most requests that wait besides.
        threads: Threads of a call; ``None``: one for each physical core that the process may use.
        chunk_len: Most prompt tokens in one call: how long decoding waits for a prompt at most.
        adapter_bytes: Most bytes of adapters; ``None``: any number.
        prefix_bytes: Most bytes of what prompts left for others that begin alike; 0: nothing is kept.
        large_pages: As for :class:`OrtSession`.

    Attributes:
        residents: The adapters.

    Raises:
        ArtifactError: The program is not whole.
        ConfigError: A size that is not positive, or does not fit the program or the memory.
    """

    def __init__(
        self,
        program: Path,
        *,
        slots: int = 8,
        ctx_len: int = 1024,
        queue_len: int = 64,
        threads: int | None = None,
        chunk_len: int = 128,
        adapter_bytes: int | None = None,
        prefix_bytes: int = 64 << 20,
        large_pages: bool = False,
    ) -> None:
        if queue_len < 1:
            raise ConfigError(f"queue_len must be at least 1, not {queue_len}")
        self._session = SlotSession(program, threads=threads, large_pages=large_pages)
        self._session.allocate(slots, ctx_len)
        self._ctx_len, self._queue_len = ctx_len, queue_len
        self._batch = Batch(self._session, slots, chunk_len, prefix_bytes)
        forget = self._batch.prefixes.forget if self._batch.prefixes is not None else lambda version: None
        self.residents = Residents(self._session, max_bytes=adapter_bytes, on_drop=forget)
        self._condition = threading.Condition()
        self._queue: FairQueue[Seat] = FairQueue()
        self._live: dict[int, Seat] = {}
        self._cancelled: set[int] = set()
        self._stats = Stats(slots)
        self._thread: threading.Thread | None = None
        self._closing = False

    # -- adapters

    @property
    def manifest(self) -> Any:
        """The program's manifest."""
        return self._session.manifest

    @property
    def mixed(self) -> bool:
        """Whether rows with different adapters run in one call."""
        return self._session.mixed

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names that requests may use, besides ``"base"``."""
        return self.residents.names

    def load_adapter(self, name: str, tensors: Mapping[str, Array]) -> None:
        """Make an adapter resident. One of the same name is replaced: requests that are here finish with the old one.

        Args:
            name: Any name but ``"base"``, without ``@``.
            tensors: Everything the manifest asks for, scalings included; of prompt learning, the first entries of the cache.

        Raises:
            QEffError: As :meth:`Residents.add`; nothing has changed then.
        """
        self.residents.load(name, tensors)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter: no new request may use it; its memory is free when those that are here have finished.

        Raises:
            AdapterNotFoundError: No adapter of that name is resident.
            ConfigError: The name is ``"base"``.
        """
        self.residents.unload(name)

    # -- requests

    def submit(self, request: Request) -> Stream:
        """Accept a request and return the stream of its tokens. It runs once the engine is started.

        Raises:
            ConfigError: Token ids, sizes or sampling that the program cannot serve.
            AdapterNotFoundError: Its adapter is not resident.
            QueueFullError: As many requests wait as may wait, or the engine is closing.
        """
        with self._condition:
            if len(self._queue) >= self._queue_len + self._batch.rows - self._batch.active:
                raise QueueFullError(
                    f"{len(self._queue)} requests wait already, {self._queue_len} may; try again later"
                )
            return self._accept(self._seat(request))

    def submit_all(self, requests: Sequence[Request]) -> list[Stream]:
        """Accept all requests or none, whatever the queue's bound: for a caller that has them all, and waits for them.

        Raises:
            QEffError: As :meth:`submit`; nothing has been accepted then.
        """
        seats: list[Seat] = []
        with self._condition:
            try:
                seats.extend(self._seat(request) for request in requests)
            except BaseException:
                for seat in seats:
                    self.residents.release(seat.resident)
                raise
            return [self._accept(seat) for seat in seats]

    def _seat(self, request: Request) -> Seat:
        """Hold the adapter of a request that can be served: what is checked is the version that it will run with."""
        if self._closing:
            raise QueueFullError("the engine is closing and takes no more requests")
        resident = self.residents.hold(request.adapter)
        try:
            check(request, self._session.manifest.vocab_size, self._ctx_len, resident.virtual_tokens)
        except BaseException:
            self.residents.release(resident)
            raise
        return Seat(Stream(request, self._cancel), resident)

    def _accept(self, seat: Seat) -> Stream:
        self._live[id(seat.stream)] = seat
        self._queue.put(seat.resident.name, seat)
        self._stats.requests[seat.resident.name] += 1
        self._condition.notify_all()
        return seat.stream

    def _cancel(self, stream: Stream) -> None:
        with self._condition:
            seat = self._live.get(id(stream))
            if seat is None or seat.stream is not stream:
                return
            if self._queue.remove(seat.resident.name, seat):
                self._finish(seat, "cancelled")
                return
            self._cancelled.add(id(stream))
            self._condition.notify_all()
        stream._end("cancelled")

    def _finish(self, seat: Seat, reason: str, error: BaseException | None = None) -> None:
        """Forget a request that is in no row any more, then tell its stream."""
        self._live.pop(id(seat.stream), None)
        self._cancelled.discard(id(seat.stream))
        self.residents.release(seat.resident)
        self._stats.finished[reason] += 1
        seat.stream._end(reason, error)

    # -- running

    def start(self) -> "Engine":
        """Start the engine's thread; return the engine."""
        with self._condition:
            if self._closing:
                raise ConfigError("the engine has been closed; make another one")
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="qefficient-engine", daemon=True)
                self._thread.start()
        return self

    def close(self, timeout: float | None = 30.0) -> None:
        """Take no more requests, let those that are here finish, and cancel what is left after ``timeout`` seconds."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
            running = self._thread is not None and self._thread.is_alive()
            if running:
                self._condition.wait_for(lambda: not self._live, timeout)
            left = [seat.stream for seat in self._live.values()]
        for stream in left:
            stream.cancel()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> "Engine":
        """Start the engine."""
        return self.start()

    def __exit__(self, *error: object) -> None:
        """Close the engine; at once if there was an error."""
        self.close(0.0 if error[0] is not None else None)

    def stats(self) -> Stats:
        """Return a copy of the counts."""
        kept = self._batch.prefixes.bytes if self._batch.prefixes is not None else 0
        with self._condition:
            return self._stats.copy(active=self._batch.active, waiting=len(self._queue), prefix_bytes=kept)

    def memory_bytes(self) -> dict[str, int]:
        """Return what ``weights``, ``cache`` and ``adapters`` take; joined copies of running adapters are not counted."""
        return self._session.memory_bytes()

    def _work(self) -> None:
        batch = self._batch
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._live or self._closing)
                if not self._live:
                    return
                self._sweep()
                if batch.filling is None and len(batch.decoding) < batch.rows and len(self._queue):
                    batch.filling = self._queue.take()
            try:
                if batch.filling is not None:
                    self._fill(batch.filling)
                if batch.decoding:
                    self._decode()
            except Exception as error:  # whatever went wrong, no request may wait for ever
                with self._condition:
                    for seat in batch.clear():
                        self._finish(seat, "error", error)
                    self._condition.notify_all()

    def _sweep(self) -> None:
        """Take cancelled requests out of their rows."""
        if not self._cancelled:
            return
        batch = self._batch
        if batch.filling is not None and id(batch.filling.stream) in self._cancelled:
            seat, batch.filling = batch.filling, None
            self._finish(seat, "cancelled")
        for row in reversed(range(len(batch.decoding))):
            if id(batch.decoding[row].stream) in self._cancelled:
                self._finish(batch.leave(row), "cancelled")
        self._condition.notify_all()

    def _fill(self, seat: Seat) -> None:
        start, batch = time.perf_counter(), self._batch
        computed, logits = batch.fill()
        with self._condition:
            self._stats.prompt_tokens += computed
            self._stats.prefill_seconds += time.perf_counter() - start
            if logits is not None:
                self._stats.reused[seat.resident.name] += seat.copied
                batch.filling = None
                batch.decoding.append(seat)
                self._deliver([len(batch.decoding) - 1], logits)
                batch.group()

    def _decode(self) -> None:
        start, count = time.perf_counter(), len(self._batch.decoding)
        logits = self._batch.step()
        with self._condition:
            self._deliver(range(count), logits)
            seconds = time.perf_counter() - start
            self._stats.decode_seconds += seconds
            if count == self._batch.rows:
                self._stats.full_tokens += count
                self._stats.full_seconds += seconds

    def _deliver(self, rows: Any, logits: Array) -> None:
        """Choose a token for each row and take finished requests out."""
        ended: list[tuple[int, str, BaseException | None]] = []
        for row, one in zip(rows, logits, strict=True):
            seat = self._batch.decoding[row]
            token = seat.chooser.choose(one)
            seat.token = token.id
            seat.produced += 1
            self._stats.new_tokens += 1
            self._stats.tokens[seat.resident.name] += 1
            try:
                seat.stream._put(token)
            except Exception as error:  # of the listener's own code: its request ends, its neighbours go on
                ended.append((row, "error", error))
                continue
            if id(seat.stream) in self._cancelled:
                ended.append((row, "cancelled", None))
            elif token.id in seat.request.eos_ids:
                ended.append((row, "stop", None))
            elif seat.produced == seat.request.max_new_tokens:
                ended.append((row, "length", None))
        for row, reason, problem in reversed(ended):
            self._finish(self._batch.leave(row), reason, problem)
        if ended:
            self._condition.notify_all()
