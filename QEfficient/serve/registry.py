# SPDX-License-Identifier: BSD-3-Clause
"""Adapters that are known, and those of them that are in memory.

Knows names, versions, bytes and who uses what; does not know HTTP, nor what is in an adapter. A version is one content of
an adapter's files: it has a name of its own in the engine, so that no cache of another version can meet it. It is checked
once, loaded in the background when it is first asked for, and given up when memory is short and nobody uses it.
"""

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from QEfficient.contract import BASE
from QEfficient.errors import AdapterMismatchError, AdapterNotFoundError, ConfigError, QEffError
from QEfficient.options import suggest
from QEfficient.peft.adapters import check_name
from QEfficient.serve.loading import Verdict


class RegistryFullError(QEffError, RuntimeError):
    """No room for an adapter: everything that is resident is in use. Try again later."""


class State(StrEnum):
    """Where a version is."""

    REGISTERED = "registered"
    LOADING = "loading"
    RESIDENT = "resident"
    REFUSED = "refused"


class Engine(Protocol):
    """What the registry asks of an engine."""

    def load_adapter(self, name: str, tensors: Mapping[str, Any]) -> Any:
        """Make an adapter resident."""

    def unload_adapter(self, name: str) -> Any:
        """Forget it."""


class Source(Protocol):
    """What the registry asks of a loader."""

    def digest(self, path: str | Path) -> str:
        """Return the identity of an adapter's files."""

    def examine(self, name: str, path: str | Path) -> Verdict:
        """Check them."""

    def tensors(self, name: str, path: str | Path, digest: str) -> dict[str, Any]:
        """Read them."""


@dataclass(slots=True)
class Version:
    """One content of an adapter.

    Attributes:
        name: Of the adapter.
        path: Its folder or Hub id.
        engine_name: What the engine knows it by.
        state: Where it is.
        digest: Of its files, once they were checked.
        refused: Why it is not served.
        warnings: What the checks warned of.
        bytes: In memory.
        leases: Requests that use it.
        loads: How often it was loaded.
        load_seconds: The last time.
        used: When it was last asked for, in the registry's count of uses.
        retired: Replaced or unregistered; goes when nobody uses it.
    """

    name: str
    path: str | Path
    engine_name: str
    state: State = State.REGISTERED
    digest: str = ""
    refused: str = ""
    warnings: tuple[str, ...] = ()
    bytes: int = 0
    leases: int = 0
    loads: int = 0
    load_seconds: float = 0.0
    used: int = 0
    retired: bool = False
    ready: "Future[None] | None" = None


@dataclass(slots=True)
class Counts:
    """What happened so far.

    Attributes:
        hits: Requests whose adapter was resident.
        misses: Requests that waited for one.
        loads: Adapters loaded.
        evictions: Adapters given up for others.
        refusals: Adapters that failed the checks or could not be read.
        load_seconds: Of all loads.
    """

    hits: int = 0
    misses: int = 0
    loads: int = 0
    evictions: int = 0
    refusals: int = 0
    load_seconds: float = 0.0


class Lease:
    """The right to use a version; while it is held, the version stays in memory. A context manager."""

    def __init__(self, registry: "Registry", version: Version | None) -> None:
        self._registry, self._version = registry, version
        self.engine_name = version.engine_name if version is not None else BASE

    def release(self) -> None:
        """Give it back; a second time does nothing."""
        version, self._version = self._version, None
        if version is not None:
            self._registry.give_back(version)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclass(slots=True)
class Registry:
    """Adapters of one engine.

    Args:
        engine: Where adapters become resident.
        source: Reads and checks them.
        max_bytes: Most bytes of resident adapters. While one is being read, its own come on top.
        on_load: Told of each load, for metrics: adapter and seconds.
    """

    engine: Engine
    source: Source
    max_bytes: int
    on_load: Callable[[str, float], None] = lambda name, seconds: None
    counts: Counts = field(default_factory=Counts)
    _current: dict[str, Version] = field(default_factory=dict)
    _resident: dict[str, Version] = field(default_factory=dict)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _uses: int = 0
    _closed: bool = False
    _worker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "adapter-loader"))

    # -- what is known

    def register(self, name: str, path: str | Path, *, replace: bool = False) -> None:
        """Know an adapter from now on; nothing is read yet.

        Args:
            name: What clients ask for.
            path: Folder or Hub id.
            replace: Take the place of an adapter of that name: requests that run finish with the old version.

        Raises:
            ConfigError: The name cannot be one, or is taken.
        """
        check_name(name)
        with self._changed:
            old = self._current.get(name)
            if old is not None and not replace:
                raise ConfigError(f"there already is an adapter {name!r}; unload it first, or replace it")
            self._current[name] = self._new(name, path)
            if old is not None:
                self._retire(old)

    def unregister(self, name: str) -> None:
        """Forget an adapter; requests that run finish with it.

        Raises:
            AdapterNotFoundError: There is none of that name.
        """
        with self._changed:
            self._retire(self._find(name))
            del self._current[name]

    def load(self, name: str, path: str | Path, *, replace: bool = False, seconds: float = 120.0) -> None:
        """Check and load an adapter, and only then know it; one that is refused changes nothing.

        Raises:
            ConfigError: The name cannot be one, or is taken.
            QEffError: Why it is refused.
        """
        check_name(name)
        with self._changed:
            if name in self._current and not replace:
                raise ConfigError(f"there already is an adapter {name!r}; unload it first, or replace it")
            version = self._new(name, path)
            version.leases += 1
        try:
            self._wait(version, seconds)
            with self._changed:
                old = self._current.get(name)
                if old is not None and not replace:
                    version.retired = True
                    raise ConfigError(f"there already is an adapter {name!r}; unload it first, or replace it")
                self._current[name] = version
                if old is not None:
                    self._retire(old)
        except QEffError:
            version.retired = True
            raise
        finally:
            self.give_back(version)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that are known, refused ones included."""
        with self._changed:
            return tuple(self._current)

    def versions(self) -> list[Version]:
        """Return the current version of every adapter."""
        with self._changed:
            return list(self._current.values())

    @property
    def resident_bytes(self) -> int:
        """What resident adapters take."""
        with self._changed:
            return sum(v.bytes for v in self._resident.values())

    @property
    def resident(self) -> int:
        """How many adapters are resident."""
        with self._changed:
            return len(self._resident)

    # -- use

    def try_acquire(self, name: str) -> Lease | None:
        """Return a lease if that takes no waiting, else ``None``.

        Raises:
            AdapterNotFoundError: There is no adapter of that name.
            AdapterMismatchError: It was refused.
        """
        if name == BASE:
            return Lease(self, None)
        with self._changed:
            version = self._find(name)
            _raise_if_refused(version)
            if version.state is not State.RESIDENT:
                return None
            self.counts.hits += 1
            self._use(version)
            return Lease(self, version)

    def acquire(self, name: str, *, seconds: float = 120.0) -> Lease:
        """Return a lease, loading the adapter if need be.

        Raises:
            AdapterNotFoundError: There is no adapter of that name.
            AdapterMismatchError: It is refused; says why.
            RegistryFullError: It could not be loaded within ``seconds``.
        """
        if (lease := self.try_acquire(name)) is not None:
            return lease
        with self._changed:
            version = self._find(name)
            self.counts.misses += 1
            self._use(version)
        try:
            self._wait(version, seconds)
        except BaseException:
            self.give_back(version)
            raise
        return Lease(self, version)

    def give_back(self, version: Version) -> None:
        """End one use of a version."""
        with self._changed:
            version.leases -= 1
            if version.retired and not version.leases:
                self._drop(version)
            self._changed.notify_all()

    def close(self) -> None:
        """Load nothing any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._worker.shutdown(wait=True, cancel_futures=True)

    # -- inside

    def _new(self, name: str, path: str | Path) -> Version:
        # A number that no other version has: engine names cannot meet, whatever adapters are called.
        return Version(name, path, f"{name}--{next(self._numbers)}")

    def _find(self, name: str) -> Version:
        if name not in self._current:
            raise AdapterNotFoundError(f"no adapter {name!r}{suggest(name, self._current)}")
        return self._current[name]

    def _use(self, version: Version) -> None:
        self._uses += 1
        version.used = self._uses
        version.leases += 1

    def _retire(self, version: Version) -> None:
        version.retired = True
        if not version.leases:
            self._drop(version)

    def _drop(self, version: Version) -> None:
        if self._resident.pop(version.engine_name, None) is not None:
            self.engine.unload_adapter(version.engine_name)
            version.state, version.ready, version.bytes = State.REGISTERED, None, 0
            self._changed.notify_all()

    def _wait(self, version: Version, seconds: float) -> None:
        with self._changed:
            if version.state is State.RESIDENT:
                return
            if version.ready is None:
                version.state = State.LOADING
                version.ready = self._worker.submit(self._load, version, seconds)
            ready = version.ready
        try:
            ready.result(seconds)
        except TimeoutError as e:
            raise RegistryFullError(f"adapter {version.name!r} could not be loaded within {seconds:.0f} s") from e
        _raise_if_refused(version)

    def _load(self, version: Version, seconds: float) -> None:
        """Make a version resident; runs in the background, one at a time."""
        start = time.perf_counter()
        try:
            self._examine(version)
            tensors = self.source.tensors(version.name, version.path, version.digest)
            need = sum(t.nbytes for t in tensors.values())
            if need > self.max_bytes:
                raise AdapterMismatchError(f"it takes {need} bytes, all adapters together may take {self.max_bytes}")
            self._make_room(need, seconds)
            self.engine.load_adapter(version.engine_name, tensors)
        except RegistryFullError:
            with self._changed:
                version.state, version.ready = State.REGISTERED, None
            raise
        except Exception as e:  # whatever is wrong with one adapter, the others go on
            with self._changed:
                version.state, version.ready = State.REFUSED, None
                version.refused = str(e) or type(e).__name__
                self.counts.refusals += 1
                self._changed.notify_all()
            return
        with self._changed:
            version.state, version.bytes = State.RESIDENT, need
            version.loads += 1
            version.load_seconds = time.perf_counter() - start
            self._resident[version.engine_name] = version
            self.counts.loads += 1
            self.counts.load_seconds += version.load_seconds
            if version.retired and not version.leases:
                self._drop(version)
        self.on_load(version.name, version.load_seconds)

    def _examine(self, version: Version) -> None:
        if version.digest and self.source.digest(version.path) == version.digest:
            return  # evicted before, and unchanged
        if version.digest:
            raise AdapterMismatchError(
                "its files changed since they were checked; load it again to serve the new version"
            )
        verdict = self.source.examine(version.name, version.path)
        version.warnings = verdict.warnings
        if verdict.refused:
            raise AdapterMismatchError(verdict.refused)
        version.digest = verdict.digest

    def _make_room(self, need: int, seconds: float) -> None:
        """Evict what was not used for longest until ``need`` bytes fit."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while sum(v.bytes for v in self._resident.values()) + need > self.max_bytes:
                idle = [v for v in self._resident.values() if not v.leases]
                if idle:
                    self._drop(min(idle, key=lambda v: v.used))
                    self.counts.evictions += 1
                    continue
                left = deadline - time.monotonic()
                if left <= 0 or self._closed:
                    raise RegistryFullError("every resident adapter is in use; try again later")
                self._changed.wait(left)


def _raise_if_refused(version: Version) -> None:
    if version.state is State.REFUSED:
        raise AdapterMismatchError(f"adapter {version.name!r} is not served: {version.refused}")
