# SPDX-License-Identifier: BSD-3-Clause
"""Adapters that are known, and how they come into memory: fetched, checked and loaded in the background when first asked for.

Knows names, places, verdicts and who waits; does not know HTTP, nor what is in an adapter. Versions, their uses and their memory belong to
the engine's residents; an adapter that was evicted there is loaded again when it is asked for.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from QEfficient.contract import BASE
from QEfficient.errors import AdapterMismatchError, AdapterNotFoundError, AdaptersFullError, ConfigError
from QEfficient.options import suggest
from QEfficient.peft.adapters import check_name
from QEfficient.runtime.residents import Resident, Residents
from QEfficient.serve.entries import Counts, Entry, Lease, Source
from QEfficient.serve.logs import log

_FETCHES = 4
"""Adapters that come from the Hub at a time; a slow one holds up nothing else."""


@dataclass(slots=True)
class Registry:
    """Adapters of one base.

    Args:
        residents: Of the engine that serves the base.
        source: Fetches, checks and reads them, and knows the engines.
        seconds: How long a load waits for memory that others use.
        on_load: Told of each load, for metrics: adapter and seconds.
    """

    residents: Residents
    source: Source
    seconds: float = 120.0
    on_load: Callable[[str, float], None] = lambda name, seconds: None
    counts: Counts = field(default_factory=Counts)
    _current: dict[str, Entry] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _closed: bool = False
    _fetcher: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(_FETCHES, "adapter-fetcher"))
    _worker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "adapter-loader"))
    _preparer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "adapter-preparer"))

    # -- what is known

    def register(self, name: str, place: str | Path, *, replace: bool = False) -> None:
        """Know an adapter from now on; nothing is read yet.

        Args:
            name: What clients ask for.
            place: Folder or Hub id.
            replace: Take the place of an adapter of that name: requests that run finish with the old version.

        Raises:
            ConfigError: The name cannot be one, or is taken.
        """
        check_name(name)
        with self._lock:
            self._need_free(name, replace)
            self._forget(name)
            self._current[name] = Entry(name, place)

    def unregister(self, name: str) -> None:
        """Forget an adapter; requests that run finish with it.

        Raises:
            AdapterNotFoundError: There is none of that name.
        """
        with self._lock:
            self._find(name)
            self._forget(name)

    def load(self, name: str, place: str | Path, *, replace: bool = False, seconds: float = 120.0) -> None:
        """Check and load an adapter, and only then know it; one that is refused changes nothing.

        Raises:
            ConfigError: The name cannot be one, or is taken.
            QEffError: Why it is refused.
        """
        check_name(name)
        with self._lock:
            self._need_free(name, replace)
            asked = self._ask(Entry(name, place, candidate=True, replaces=replace))
        self._result(name, asked, seconds).release()

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that are known, refused ones included."""
        with self._lock:
            return tuple(self._current)

    def entries(self) -> list[Entry]:
        """Return every adapter that is known."""
        with self._lock:
            return list(self._current.values())

    # -- use

    def ask(self, name: str) -> "Future[Lease]":
        """Return what will be the right to use an adapter; it is there already if the adapter is in memory.

        Whoever waits no longer calls ``cancel()``, and releases the lease if that comes too late.

        Raises:
            AdapterNotFoundError: There is no adapter of that name.
            AdapterMismatchError: It was refused.
        """
        with self._lock:
            entry = Entry(BASE, "", resident=self.residents.find(BASE)) if name == BASE else self._find(name)
            if entry.refused:
                raise _refusal(name, entry.refused)
            if entry.resident is not None and entry.resident.home.try_hold(entry.resident):
                self.counts.hits += name != BASE
                there: Future[Lease] = Future()
                there.set_result(Lease(entry.resident))
                return there
            self.counts.misses += 1
            return self._ask(entry)

    def acquire(self, name: str, *, seconds: float = 120.0) -> Lease:
        """Wait for what :meth:`ask` promises.

        Raises:
            QEffError: As :meth:`ask`, or why it could not be loaded.
        """
        return self._result(name, self.ask(name), seconds)

    def tidy(self) -> None:
        """Let engines go that hold no adapter any more, as soon as none is being loaded."""
        with suppress(RuntimeError):  # closed
            self._worker.submit(self._tidy)

    def make_room(self) -> bool:
        """Let an engine go whose adapters are all idle, at a moment when none is being loaded; return whether there was one.

        Raises:
            AdaptersFullError: The registry is closed.
        """
        try:
            return self._worker.submit(self._evict_engine).result()
        except (RuntimeError, CancelledError) as e:
            raise AdaptersFullError("the server is closing") from e

    def close(self) -> None:
        """Load nothing any more; who waits is refused."""
        with self._lock:
            self._closed = True
        for executor in (self._fetcher, self._preparer):
            executor.shutdown(wait=False, cancel_futures=True)
        self._worker.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            for entry in self._current.values():
                self._refuse(entry, AdaptersFullError("the server is closing"), for_good=False)

    # -- inside

    def _find(self, name: str) -> Entry:
        if name not in self._current:
            raise AdapterNotFoundError(f"no adapter {name!r}{suggest(name, self._current)}")
        return self._current[name]

    def _need_free(self, name: str, replace: bool) -> None:
        if name in self._current and not replace:
            raise ConfigError(f"there already is an adapter {name!r}; unload it first, or replace it")

    def _forget(self, name: str) -> None:
        entry = self._current.pop(name, None)
        if entry is not None and entry.resident is not None:
            with suppress(AdapterNotFoundError):  # it was evicted
                entry.resident.home.unload(name)

    def _ask(self, entry: Entry) -> "Future[Lease]":
        """Wait for an entry that is not resident; the first who does makes it come."""
        if self._closed:
            raise AdaptersFullError("the server is closing")
        asked: Future[Lease] = Future()
        entry.waiting.append(asked)
        if len(entry.waiting) == 1:
            if entry.folder is None:
                self._fetcher.submit(self._fetch, entry)
            else:
                self._worker.submit(self._load, entry)
        return asked

    def _result(self, name: str, asked: "Future[Lease]", seconds: float) -> Lease:
        try:
            return asked.result(seconds)
        except TimeoutError as e:
            if not asked.cancel():
                return asked.result()
            raise AdaptersFullError(f"adapter {name!r} could not be loaded within {seconds:.0f} s") from e

    def _fetch(self, entry: Entry) -> None:
        """Find an adapter's folder, perhaps by downloading it; then load it. What fails here is tried again the next time."""
        try:
            entry.folder = self.source.fetch(entry.place)
            self._worker.submit(self._load, entry)
        except Exception as e:  # not there, no network, the worker closed: those who wait are told
            self._refuse(entry, e, for_good=False)

    def _load(self, entry: Entry) -> None:
        """Make an adapter resident; runs in the background, one at a time."""
        start = time.perf_counter()
        try:
            resident = self._bring(entry)
            if resident is None:
                self._preparer.submit(self._prepare, entry)
                return
        except Exception as e:  # whatever is wrong with one adapter, the others go on
            self._refuse(entry, e)
            self._tidy()  # an engine may have been made for it
            return
        seconds = time.perf_counter() - start
        with self._lock:
            entry.loads += 1
            entry.load_seconds = seconds
            self.counts.loads += 1
            self.counts.load_seconds += seconds
            self._arrive(entry, resident)
        self.on_load(entry.name, seconds)

    def _evict_engine(self) -> bool:
        done = self.source.evict()
        self._tidy()
        return done

    def _tidy(self) -> None:
        with self._lock:
            for entry in self._current.values():
                if entry.resident is not None and entry.resident.gone:
                    entry.resident = None  # it knows the engine that it was in
        if self.source.tidy():
            with self._lock:
                for entry in self._current.values():
                    if entry.unprepared:
                        entry.refused, entry.unprepared = "", False

    def _prepare(self, entry: Entry) -> None:
        """Make an adapter ready that cannot be loaded as it lies there; then load it."""
        try:
            self.source.prepare(entry.name, entry.folder or Path(), entry.digest)
            self._worker.submit(self._load, entry)
        except Exception as e:  # as above
            entry.unprepared = True
            self._refuse(entry, e)

    def _bring(self, entry: Entry) -> Resident | None:
        """Return an adapter that is resident now, or nothing if it must be prepared first."""
        folder = entry.folder or Path()
        if not entry.digest:
            verdict = self.source.examine(entry.name, folder)
            entry.warnings = verdict.warnings
            if verdict.refused:
                raise AdapterMismatchError(verdict.refused)
            entry.digest = verdict.digest
        elif self.source.digest(folder) != entry.digest:
            raise AdapterMismatchError(
                "its files changed since they were checked; load it again to serve the new version"
            )
        found = self.source.tensors(entry.name, folder, entry.digest)
        return found and found[0].add(entry.name, found[1], seconds=self.seconds)

    def _arrive(self, entry: Entry, resident: Resident) -> None:
        """Give an adapter that is resident now to those who wait; if it is still the one of its name, to later ones too."""
        try:
            if entry.candidate:
                if all(asked.cancelled() for asked in entry.waiting):
                    raise AdaptersFullError("nobody waits for it any more")
                self._need_free(entry.name, entry.replaces)
                entry.candidate = False
                self._forget(entry.name)
                self._current[entry.name] = entry
            entry.resident = resident
            if self._current.get(entry.name) is entry:
                resident.home.publish(resident)
            waiting, entry.waiting = entry.waiting, []
            for asked in waiting:
                if asked.set_running_or_notify_cancel():
                    resident.home.try_hold(resident)
                    asked.set_result(Lease(resident))
        except (ConfigError, AdaptersFullError) as e:
            self._refuse(entry, e, for_good=False)
        finally:
            resident.home.release(resident)

    def _refuse(self, entry: Entry, error: Exception, *, for_good: bool = True) -> None:
        """Tell those who wait why there is no adapter; ``for_good``: later ones, too."""
        with self._lock:
            if not isinstance(error, ConfigError | AdaptersFullError):
                reason = str(error) or type(error).__name__
                log("adapter refused", level=logging.WARNING, model=entry.name, reason=reason)
                self.counts.refusals += 1
                entry.refused = reason if for_good else ""
                error = _refusal(entry.name, reason)
            waiting, entry.waiting = entry.waiting, []
            for asked in waiting:
                if asked.set_running_or_notify_cancel():
                    asked.set_exception(error)


def _refusal(name: str, reason: str) -> AdapterMismatchError:
    return AdapterMismatchError(f"adapter {name!r} is not served: {reason}")
