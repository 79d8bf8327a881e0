# SPDX-License-Identifier: BSD-3-Clause
"""What a registry knows of an adapter, what it counts, and what it asks of a loader."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from QEfficient.runtime.residents import Resident, Residents


class State(StrEnum):
    """Where an adapter is."""

    REGISTERED = "registered"
    LOADING = "loading"
    RESIDENT = "resident"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the checks say of an adapter's files.

    Attributes:
        refused: Why it is not served; empty if it is.
        warnings: What its owner should know.
        digest: Of the tensors' file that was looked at.
    """

    refused: str
    warnings: tuple[str, ...]
    digest: str


class Source(Protocol):
    """What the registry asks of a loader. ``fetch`` is called by several threads, the others by one at a time."""

    def fetch(self, place: str | Path) -> Path:
        """Return an adapter's folder, downloaded if need be."""

    def digest(self, folder: Path) -> str:
        """Return the identity of its files."""

    def examine(self, name: str, folder: Path) -> Verdict:
        """Check them."""

    def tensors(self, name: str, folder: Path, digest: str) -> tuple[Residents, dict[str, Any]] | None:
        """Read them, and say where they belong; ``None``: they must be prepared first."""

    def prepare(self, name: str, folder: Path, digest: str) -> None:
        """Make ready what :meth:`tensors` then reads; takes its time, and a thread of its own."""

    def tidy(self) -> bool:
        """Let go of engines that hold no adapter any more; return whether there were any."""

    def evict(self) -> bool:
        """Let the engine go that was idle for longest, with its adapters; return whether one was idle."""


@dataclass(slots=True)
class Counts:
    """What happened so far.

    Attributes:
        hits: Requests whose adapter was resident.
        misses: Requests that waited for one.
        loads: Adapters loaded.
        refusals: Adapters that failed the checks or could not be read.
        load_seconds: Of all loads.
    """

    hits: int = 0
    misses: int = 0
    loads: int = 0
    refusals: int = 0
    load_seconds: float = 0.0


class Lease:
    """The right to use a version of an adapter; while it is held, the version stays in memory. A context manager."""

    def __init__(self, resident: Resident) -> None:
        self._held = True
        self.resident = resident

    @property
    def version(self) -> str:
        """What a request to the engine calls it."""
        return self.resident.version

    def release(self) -> None:
        """Give it back; a second time does nothing."""
        held, self._held = self._held, False
        if held:
            self.resident.home.release(self.resident)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclass(slots=True, eq=False)
class Entry:
    """One content of an adapter, at one place.

    Attributes:
        name: Of the adapter.
        place: Its folder or Hub id.
        candidate: Known only once it has been loaded.
        replaces: A candidate that may take the place of another adapter of its name.
        folder: Where it lies, once it was fetched.
        digest: Of its files, once they were checked.
        refused: Why it is not served.
        unprepared: It was refused when it was prepared; that may go better once an engine has gone.
        warnings: What the checks warned of.
        loads: How often it was loaded.
        load_seconds: The last time.
        resident: The version that was loaded last; it may have been evicted since.
        waiting: Those who wait for it.
    """

    name: str
    place: str | Path
    candidate: bool = False
    replaces: bool = False
    folder: Path | None = None
    digest: str = ""
    refused: str = ""
    unprepared: bool = False
    warnings: tuple[str, ...] = ()
    loads: int = 0
    load_seconds: float = 0.0
    resident: Resident | None = None
    waiting: "list[Future[Lease]]" = field(default_factory=list)

    @property
    def state(self) -> State:
        """Where it is."""
        if self.refused:
            return State.REFUSED
        if self.resident is not None and not self.resident.gone:
            return State.RESIDENT
        return State.LOADING if self.waiting else State.REGISTERED
