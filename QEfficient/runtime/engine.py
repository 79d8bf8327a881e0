# SPDX-License-Identifier: BSD-3-Clause
"""Continuous batching: requests join and leave a running batch at any token, each with its own adapter.

Knows token ids; knows no text, no HTTP and no PyTorch. One thread owns the session. In each turn it takes at most one chunk of one
prompt, then one token for every row that decodes, so a long prompt never stops the others for more than a chunk. The rows
that decode are the first rows of the cache, the row that takes its prompt is the next one: what is idle costs nothing.
"""

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from QEfficient.contract import BASE
from QEfficient.errors import AdapterMismatchError, AdapterNotFoundError, ConfigError, QueueFullError, UnsupportedError
from QEfficient.options import suggest
from QEfficient.runtime.requests import Request, Stream
from QEfficient.runtime.sampling import Chooser
from QEfficient.runtime.slots import SlotSession
from QEfficient.runtime.waiting import FairQueue

Array = npt.NDArray[Any]


@dataclass(slots=True)
class Stats:
    """What an engine has done, and what it is doing.

    Attributes:
        slots: Rows of the cache.
        active: Rows in use.
        waiting: Requests that wait.
        prompt_tokens: Prompt tokens computed.
        new_tokens: Tokens produced.
        prefill_seconds: Time in calls that took prompts.
        decode_seconds: Time in calls that produced tokens.
        full_tokens: Tokens of those calls in which every slot decoded.
        full_seconds: Time in them.
        requests: Requests accepted, by adapter.
        tokens: Tokens produced, by adapter.
        finished: Requests ended, by finish reason.
    """

    slots: int
    active: int = 0
    waiting: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    full_tokens: int = 0
    full_seconds: float = 0.0
    requests: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    finished: Counter[str] = field(default_factory=Counter)


class _Slot:
    """A request on its way: waiting, taking its prompt, decoding."""

    __slots__ = ("adapter", "chooser", "length", "produced", "prompt", "request", "stream", "token")

    def __init__(self, stream: Stream, adapter: str) -> None:
        self.stream, self.request, self.adapter = stream, stream.request, adapter
        self.prompt = np.asarray(self.request.prompt_ids, np.int64)
        self.chooser = Chooser(self.request)
        self.length = 0  # positions of the cache that are filled
        self.produced = 0
        self.token = -1  # produced last, not yet in the cache


class Engine:
    """Runs many requests at a time on one program.

    Args:
        program: A program folder; compiled with ``mixed``, its rows may run with different adapters in one call.
        slots: Most requests that run at a time.
        ctx_len: Most positions of a request, prompt and new tokens together.
        queue_len: Most requests that wait besides.
        threads: Threads of a call; ``None``: one for each physical core.
        chunk_len: Most prompt tokens in one call: how long decoding waits for a prompt at most.

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
    ) -> None:
        for name, size in (("queue_len", queue_len), ("chunk_len", chunk_len)):
            if size < 1:
                raise ConfigError(f"{name} must be at least 1, not {size}")
        self._session = SlotSession(program, threads=threads)
        self._session.allocate(slots, ctx_len)
        self._slots, self._ctx_len, self._queue_len, self._chunk_len = slots, ctx_len, queue_len, chunk_len
        self._condition = threading.Condition()
        self._queue: FairQueue[_Slot] = FairQueue()
        self._decoding: list[_Slot] = []  # of rows 0, 1, 2, ...
        self._filling: _Slot | None = None  # of the row behind them
        self._names: dict[str, str] = {BASE: BASE}  # adapter -> its newest version in the session
        self._uses: Counter[str] = Counter()  # version -> requests that wait or run
        self._loads = 0
        self._live: dict[int, _Slot] = {}
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
        with self._condition:
            return tuple(n for n in self._names if n != BASE)

    def load_adapter(self, name: str, tensors: Mapping[str, Array]) -> None:
        """Make an adapter resident. One of the same name is replaced: requests that are here finish with the old one.

        Args:
            name: Any name but ``"base"``.
            tensors: Everything the manifest asks for, scalings included.

        Raises:
            ConfigError: The name is ``"base"``.
            AdapterMismatchError: The tensors do not fit or are not finite; nothing has changed then.
        """
        if name == BASE:
            raise ConfigError(f"{BASE!r} names the base without an adapter; give the adapter another name")
        for key, tensor in tensors.items():
            if not np.isfinite(tensor).all():
                # Masked out, 0 * inf would still be NaN in every row.
                raise AdapterMismatchError(f"adapter {name!r} cannot be used: {key!r} holds values that are not finite")
        if any(spec.name in tensors for spec in self._session.manifest.states):
            raise UnsupportedError(
                f"adapter {name!r} is virtual tokens, which the engine does not put into its rows yet; use a session"
            )
        with self._condition:
            self._loads += 1
            version = f"{name}@{self._loads}"
        self._session.load_adapter(version, tensors)
        with self._condition:
            old = self._names.get(name)
            self._names[name] = version
            self._drop_unused(old)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter: no new request may use it; its memory is free when those that are here have finished.

        Raises:
            AdapterNotFoundError: No adapter of that name is resident.
            ConfigError: The name is ``"base"``.
        """
        if name == BASE:
            raise ConfigError(f"{BASE!r} cannot be unloaded")
        with self._condition:
            self._version(name)
            self._drop_unused(self._names.pop(name))

    def _version(self, name: str) -> str:
        if name not in self._names:
            known = ", ".join(sorted(self._names))
            raise AdapterNotFoundError(f"no adapter {name!r} is loaded{suggest(name, self._names)} (loaded: {known})")
        return self._names[name]

    def _drop_unused(self, version: str | None) -> None:
        if version is None or version == BASE or self._uses[version] or version in self._names.values():
            return
        del self._uses[version]
        self._session.unload_adapter(version)

    # -- requests

    def submit(self, request: Request) -> Stream:
        """Accept a request and return the stream of its tokens. It runs once the engine is started.

        Raises:
            ConfigError: Token ids, sizes or sampling that the program cannot serve.
            AdapterNotFoundError: Its adapter is not resident.
            QueueFullError: As many requests wait as may wait, or the engine is closing.
        """
        self._check(request)
        with self._condition:
            self._version(request.adapter)
            idle = self._slots - len(self._decoding) - (self._filling is not None)
            if len(self._queue) >= self._queue_len + idle:
                raise QueueFullError(
                    f"{len(self._queue)} requests wait already, {self._queue_len} may; try again later"
                )
            return self._accept(request)

    def submit_all(self, requests: Sequence[Request]) -> list[Stream]:
        """Accept all requests or none, whatever the queue's bound: for a caller that has them all, and waits for them.

        Raises:
            QEffError: As :meth:`submit`; nothing has been accepted then.
        """
        for request in requests:
            self._check(request)
        with self._condition:
            for request in requests:
                self._version(request.adapter)
            return [self._accept(request) for request in requests]

    def _accept(self, request: Request) -> Stream:
        if self._closing:
            raise QueueFullError("the engine is closing and takes no more requests")
        stream = Stream(request, self._cancel)
        slot = _Slot(stream, self._version(request.adapter))
        self._live[id(stream)] = slot
        self._queue.put(request.adapter, slot)
        self._uses[slot.adapter] += 1
        self._stats.requests[request.adapter] += 1
        self._condition.notify_all()
        return stream

    def _check(self, request: Request) -> None:
        vocab = self._session.manifest.vocab_size
        if len(request.prompt_ids) < 1:
            raise ConfigError("the prompt is empty: it needs at least one token")
        if request.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, not {request.max_new_tokens}")
        if (need := len(request.prompt_ids) + request.max_new_tokens) > self._ctx_len:
            raise ConfigError(
                f"the context does not fit: {len(request.prompt_ids)} prompt tokens and {request.max_new_tokens} new ones "
                f"are {need}, a slot holds {self._ctx_len}"
            )
        for name, ids in (("prompt_ids", request.prompt_ids), ("logit_bias", request.sampling.logit_bias)):
            wrong = [i for i in ids if not 0 <= i < vocab]
            if wrong:
                raise ConfigError(f"{name}: token ids must be in [0, {vocab}), not {wrong[0]}")
        if request.logprobs is not None and request.logprobs < 0:
            raise ConfigError(f"logprobs must be at least 0, not {request.logprobs}")

    def _cancel(self, stream: Stream) -> None:
        with self._condition:
            slot = self._live.get(id(stream))
            if slot is None or slot.stream is not stream:
                return
            if self._queue.remove(slot.request.adapter, slot):
                self._finish(slot, "cancelled")
                return
            self._cancelled.add(id(stream))
            self._condition.notify_all()
        stream._end("cancelled")

    def _finish(self, slot: _Slot, reason: str, error: BaseException | None = None) -> None:
        """Forget a request that is in no row any more, then tell its stream."""
        self._live.pop(id(slot.stream), None)
        self._cancelled.discard(id(slot.stream))
        self._uses[slot.adapter] -= 1
        self._drop_unused(slot.adapter)
        self._stats.finished[reason] += 1
        slot.stream._end(reason, error)

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
            left = [slot.stream for slot in self._live.values()]
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
        with self._condition:
            now = self._stats
            return replace(
                now,
                active=len(self._decoding) + (self._filling is not None),
                waiting=len(self._queue),
                requests=Counter(now.requests),
                tokens=Counter(now.tokens),
                finished=Counter(now.finished),
            )

    def memory_bytes(self) -> dict[str, int]:
        """Return what ``weights``, ``cache`` and ``adapters`` take; joined copies of running adapters are not counted."""
        return self._session.memory_bytes()

    def _work(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._live or self._closing)
                if not self._live:
                    return
                self._sweep()
                if self._filling is None and len(self._decoding) < self._slots and len(self._queue):
                    self._filling = self._queue.take()
            try:
                if self._filling is not None:
                    self._fill(self._filling)
                if self._decoding:
                    self._decode()
            except Exception as error:  # whatever went wrong, no request may wait for ever
                self._fail(error)

    def _sweep(self) -> None:
        """Take cancelled requests out of their rows."""
        if not self._cancelled:
            return
        if self._filling is not None and id(self._filling.stream) in self._cancelled:
            slot, self._filling = self._filling, None
            self._finish(slot, "cancelled")
        for row in reversed(range(len(self._decoding))):
            if id(self._decoding[row].stream) in self._cancelled:
                self._leave(row, "cancelled")
        self._condition.notify_all()

    def _fill(self, slot: _Slot) -> None:
        start = time.perf_counter()
        part = slot.prompt[slot.length : slot.length + self._chunk_len]
        positions = slot.length + np.arange(len(part))
        logits = self._session.run_slots(len(self._decoding), part[None], positions[None], [slot.adapter])
        slot.length += len(part)
        with self._condition:
            self._stats.prompt_tokens += len(part)
            self._stats.prefill_seconds += time.perf_counter() - start
            if slot.length == len(slot.prompt):
                self._filling = None
                self._decoding.append(slot)
                self._deliver([len(self._decoding) - 1], logits)
                self._group()

    def _decode(self) -> None:
        start = time.perf_counter()
        slots = self._decoding
        ids = np.array([[s.token] for s in slots])
        positions = np.array([[s.length] for s in slots])
        logits = self._session.run_slots(0, ids, positions, [s.adapter for s in slots])
        for slot in slots:
            slot.length += 1
        with self._condition:
            count = len(slots)
            self._deliver(range(count), logits)
            seconds = time.perf_counter() - start
            self._stats.decode_seconds += seconds
            if count == self._slots:
                self._stats.full_tokens += count
                self._stats.full_seconds += seconds

    def _deliver(self, rows: Any, logits: Array) -> None:
        """Choose a token for each row and take finished requests out."""
        ended: list[tuple[int, str, BaseException | None]] = []
        for row, one in zip(rows, logits, strict=True):
            slot = self._decoding[row]
            token = slot.chooser.choose(one)
            slot.token = token.id
            slot.produced += 1
            self._stats.new_tokens += 1
            self._stats.tokens[slot.request.adapter] += 1
            try:
                slot.stream._put(token)
            except Exception as error:  # of the listener's own code: its request ends, its neighbours go on
                ended.append((row, "error", error))
                continue
            if token.id in slot.request.eos_ids:
                ended.append((row, "stop", None))
            elif slot.produced == slot.request.max_new_tokens:
                ended.append((row, "length", None))
        for row, reason, problem in reversed(ended):
            self._leave(row, reason, problem)
        if ended:
            self._condition.notify_all()

    def _leave(self, row: int, reason: str, error: BaseException | None = None) -> None:
        """Free a row: the last row that decodes takes its place, and the one behind that moves up."""
        slot, last = self._decoding[row], self._decoding[-1]
        end = len(self._decoding) - 1
        if row != end:
            self._session.copy_row(end, row, last.length)
            self._decoding[row] = last
        self._decoding.pop()
        if self._filling is not None:
            self._session.copy_row(end + 1, end, self._filling.length)
        self._finish(slot, reason, error)

    def _group(self) -> None:
        """Without mixed calls, put rows of one adapter side by side: a call takes as many of them as stand together."""
        if self.mixed:
            return
        order = sorted(range(len(self._decoding)), key=lambda row: self._decoding[row].adapter)
        if order != list(range(len(order))):
            self._session.permute(order, max(s.length for s in self._decoding))
            self._decoding = [self._decoding[row] for row in order]

    def _fail(self, error: BaseException) -> None:
        with self._condition:
            slots = [*self._decoding, *([self._filling] if self._filling is not None else [])]
            self._decoding, self._filling = [], None
            for slot in slots:
                self._finish(slot, "error", error)
            self._condition.notify_all()
