# SPDX-License-Identifier: BSD-3-Clause
"""The engines of one base: one for each graph, because no graph takes adapters of every kind.

The first serves the base and, as a rule, LoRA. An adapter that fits none of the graphs here (DoRA, IA3, ``modules_to_save``, …) gets one of its
own kind, which goes with the last adapter of that kind, or for another kind once all its adapters are idle.
"""

import gc
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from QEfficient.contract import ADAPTERS_DIR, Manifest
from QEfficient.errors import AdaptersFullError
from QEfficient.peft.adapters import Adapter, fit, neutral_tensors, read_exported
from QEfficient.runtime.engine import Engine
from QEfficient.runtime.residents import Resident
from QEfficient.runtime.stats import Stats
from QEfficient.serve.preparing import Preparer, Wanted

_LOOK_SECONDS = 0.1
"""How often whoever needs an engine's place looks for one that is idle."""


@dataclass(frozen=True)
class Lane:
    """A graph and the engine that runs it."""

    graph: Path
    engine: Engine

    @cached_property
    def manifest(self) -> Manifest:
        """The graph's manifest."""
        return Manifest.read(self.graph)

    @cached_property
    def neutral(self) -> dict[str, np.ndarray]:
        """The adapter inputs of ``"base"`` that are not zero."""
        return neutral_tensors(self.graph)

    def fitted(self, adapter: Adapter) -> dict[str, np.ndarray]:
        """Return what the engine takes.

        Raises:
            AdapterMismatchError: The adapter does not fit the graph.
        """
        return {n: np.asarray(t) for n, t in fit(adapter, self.manifest, self.neutral).items()}

    def prepared(self, key: str) -> Adapter | None:
        """Return an adapter that :func:`prepare` left beside the graph."""
        file = self.graph / ADAPTERS_DIR / f"{key}.safetensors"
        return read_exported(file) if file.is_file() else None


@dataclass(slots=True)
class Lanes:
    """All engines of a server.

    Args:
        base: Folder or Hub id of the base.
        first: The engine that serves the base.
        open: Makes an engine of a program's folder, started; ``None``: there will be no others.
        most: Most engines: each holds the base's weights and a cache of its own.
        compiling: How graphs are compiled.
        preparer: Makes adapters and graphs ready.
        on_empty: Called when an engine besides the first has lost its last adapter; it must not wait for anything.
        on_full: Called when there are as many engines as may be and one more is needed; it calls :meth:`evict` at a moment when no
            adapter is loaded, and returns what that says.
        seconds: How long to wait for an engine that is idle.
    """

    base: str
    first: Lane
    open: Callable[[Path], Engine] | None = None
    most: int = 1
    compiling: Mapping[str, Any] = field(default_factory=dict)
    preparer: Preparer = field(default_factory=Preparer)
    on_empty: Callable[[], None] = lambda: None
    on_full: Callable[[], bool] = lambda: False
    seconds: float = 120.0
    _all: tuple[Lane, ...] = field(init=False)
    _opening: threading.Lock = field(default_factory=threading.Lock)
    _changing: threading.Lock = field(default_factory=threading.Lock)
    _gone: Stats = field(default_factory=lambda: Stats(slots=0))
    _gone_evictions: int = 0

    def __post_init__(self) -> None:
        """Begin with one."""
        self._all = (self.first,)

    def __iter__(self) -> Iterator[Lane]:
        """Return those that are there now."""
        return iter(self._all)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._all)

    def engine_of(self, resident: Resident) -> Engine:
        """Return the engine in whose memory an adapter is."""
        return next(lane.engine for lane in self if lane.engine.residents is resident.home)

    def prepare(self, key: str, name: str, folder: Path) -> None:
        """Make an adapter's tensors ready for one of the graphs, and if need be a graph for it; takes as long as loading the base.

        Args:
            key: Of its content; :meth:`Lane.prepared` finds it by this.
            name: What it is called in errors.
            folder: Where it lies.

        Raises:
            QEffError: It cannot be exported, or needs one graph more than there may be.
            AdaptersFullError: All graphs that could make room are in use.
        """
        with self._opening:
            most = self.most if self.open is not None else 1
            graph, program = self.preparer(
                Wanted(self.base, key, name, folder, tuple(lane.graph for lane in self), most, self.compiling)
            )
            if program is not None and self.open is not None:
                self._make_room()
                lane = Lane(graph, self.open(program))
                lane.engine.residents.on_empty = lambda: self.on_empty()
                with self._changing:
                    self._all += (lane,)

    def _make_room(self) -> None:
        """Wait until there may be one engine more."""
        deadline = time.monotonic() + self.seconds
        while len(self) >= self.most and not self.on_full():
            if time.monotonic() > deadline:
                raise AdaptersFullError(f"all {self.most} graphs of this server are in use; try again later")
            time.sleep(_LOOK_SECONDS)

    def evict(self) -> bool:
        """Close the engine, not the first, whose adapters have been idle for longest; return whether one was idle.

        Whoever calls this loads no adapter at that moment.
        """
        homes = [lane.engine.residents for lane in self._all[1:]]
        idle = {home: used for home in homes if (used := home.last_use()) is not None}
        return bool(idle) and min(idle, key=idle.__getitem__).evict_all() and self.close_empty()

    def close_empty(self) -> bool:
        """Close all engines but the first that hold no adapter; return whether there were any.

        Whoever calls this loads no adapter at that moment.
        """
        empty = [lane.engine for lane in self._all[1:] if not len(lane.engine.residents)]
        for engine in empty:
            with self._changing:
                done = engine.stats().copy(slots=0, active=0, waiting=0, prefix_bytes=0)
                self._gone = _total([self._gone, done])
                self._gone_evictions += engine.residents.evictions
                self._all = tuple(lane for lane in self._all if lane.engine is not engine)
            engine.close(timeout=0.0)
        if not empty:
            return False
        del engine, empty
        gc.collect()  # an engine and its adapters know each other: weights and cache would wait for that
        return True

    def stats(self) -> Stats:
        """Return the counts of all engines together, those that were closed included."""
        with self._changing:
            return _total([self._gone, *(lane.engine.stats() for lane in self)])

    def memory(self) -> dict[str, int | None]:
        """Return of all engines together: adapters in memory, their bytes, most bytes (``None``: any), evictions, bytes of weights and cache."""
        with self._changing:
            found, gone = [lane.engine.residents for lane in self], self._gone_evictions
            taken = [lane.engine.memory_bytes() for lane in self]
        bounds = [r.max_bytes for r in found if r.max_bytes is not None]
        return {
            "adapters": sum(len(r) for r in found),
            "bytes": sum(r.bytes for r in found),
            "limit": sum(bounds) if bounds else None,
            "evictions": gone + sum(r.evictions for r in found),
            "weights": sum(t["weights"] for t in taken),
            "cache": sum(t["cache"] for t in taken),
        }

    def stop(self) -> None:
        """Prepare nothing any more."""
        self.preparer.stop()

    def close(self, timeout: float) -> None:
        """Stop all engines."""
        self.stop()
        for lane in self:
            lane.engine.close(timeout=timeout)


def _total(found: Iterable[Stats]) -> Stats:
    total: dict[str, Any] = {}
    for one in found:
        for key in one.__slots__:
            value = getattr(one, key)
            total[key] = total.get(key, Counter() if isinstance(value, Counter) else 0) + value
    return Stats(**total)
