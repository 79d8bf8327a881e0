# SPDX-License-Identifier: BSD-3-Clause
"""Adapters in a session: their names, their versions, who uses which, and how much memory they may take.

A version is what one call of :meth:`Residents.add` brought; it has a name of its own in the session (``sql@3``), so that nothing that
was computed with one version can meet another. It stays as long as it is used, and goes when it is neither used nor the
newest of its name. Knows nothing of files or requests. Safe to call from several threads.
"""

import itertools
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from QEfficient.contract import BASE
from QEfficient.errors import AdapterMismatchError, AdapterNotFoundError, AdaptersFullError, ConfigError
from QEfficient.options import suggest

Array = npt.NDArray[Any]


class Holder(Protocol):
    """What is asked of a session."""

    def load_adapter(self, name: str, tensors: Mapping[str, Array]) -> None:
        """Make an adapter resident."""

    def unload_adapter(self, name: str) -> None:
        """Forget it."""

    def adapter_bytes(self, name: str) -> int:
        """Return what it takes."""

    def entries_of(self, name: str) -> int:
        """Return how many virtual tokens it puts first into a row."""


@dataclass(slots=True, eq=False)
class Resident:
    """One version of an adapter.

    Attributes:
        name: Of the adapter.
        version: Its name in the session.
        home: Where it is.
        bytes: What it takes there.
        virtual_tokens: Entries that it puts first into every row.
        uses: Who holds it: requests, and whoever is about to make one.
        used: When it was last taken, in a count of such moments in all sessions.
        gone: It is no longer in the session.
    """

    name: str
    version: str
    home: "Residents"
    bytes: int = 0
    virtual_tokens: int = 0
    uses: int = 0
    used: int = 0
    gone: bool = False


_MOMENTS = itertools.count(1)


class Residents:
    """The adapters of one session.

    Args:
        session: Where they are.
        max_bytes: Most bytes of them; the one unused for longest goes first. While one comes, its own are on top. ``None``: any number.
        on_drop: Told of each version that has gone.

    Attributes:
        evictions: Versions that went because others needed their memory.
        on_empty: Called when the last version has gone; whoever wants to know puts it here. It must not wait for anything.
    """

    def __init__(
        self, session: Holder, *, max_bytes: int | None = None, on_drop: Callable[[str], None] = lambda version: None
    ) -> None:
        if max_bytes is not None and max_bytes < 1:
            raise ConfigError(f"adapters need at least 1 byte of memory, not {max_bytes}")
        self.max_bytes, self.evictions = max_bytes, 0
        self._session, self._on_drop = session, on_drop
        self.on_empty: Callable[[], None] = lambda: None
        self._changed = threading.Condition(threading.RLock())
        self._numbers = itertools.count(1)
        self._here: dict[str, Resident] = {}  # by version
        self._newest: dict[str, Resident] = {BASE: Resident(BASE, BASE, self)}  # by name

    @property
    def names(self) -> tuple[str, ...]:
        """Names that may be held, besides ``"base"``."""
        with self._changed:
            return tuple(n for n in self._newest if n != BASE)

    @property
    def bytes(self) -> int:
        """What all versions take."""
        with self._changed:
            return sum(r.bytes for r in self._here.values())

    def __len__(self) -> int:
        """Return how many versions there are."""
        return len(self._here)

    def load(self, name: str, tensors: Mapping[str, Array], *, seconds: float = 0.0) -> None:
        """Let ``name`` mean these tensors from now on; who uses an older version keeps it.

        Raises:
            QEffError: As :meth:`add`.
        """
        made = self.add(name, tensors, seconds=seconds)
        self.publish(made)
        self.release(made)

    def add(self, name: str, tensors: Mapping[str, Array], *, seconds: float = 0.0) -> Resident:
        """Bring a version that nobody can ask for by its name yet, and hold it.

        Args:
            name: Of the adapter.
            tensors: Everything the manifest asks for, scalings included.
            seconds: How long to wait for memory that others use.

        Raises:
            ConfigError: The name is ``"base"`` or looks like a version.
            AdapterMismatchError: The tensors do not fit, are not finite, or take more than all adapters may. Nothing has changed then.
            AdaptersFullError: Everything that is resident is in use.
        """
        if name == BASE or "@" in name:
            raise ConfigError(
                f"an adapter cannot be called {name!r}: 'base' and '@' mean something here; choose another name"
            )
        for key, tensor in tensors.items():
            if not np.isfinite(tensor).all():
                # Masked out, 0 * inf would still be NaN in every row.
                raise AdapterMismatchError(f"adapter {name!r} cannot be used: {key!r} holds values that are not finite")
        made = Resident(name, f"{name}@{next(self._numbers)}", self, uses=1)
        self._session.load_adapter(made.version, tensors)
        made.bytes = self._session.adapter_bytes(made.version)
        made.virtual_tokens = self._session.entries_of(made.version)
        with self._changed:
            made.used = next(_MOMENTS)
            self._here[made.version] = made
        try:
            self._make_room(made, seconds)
        except BaseException:
            self.release(made)
            raise
        return made

    def publish(self, resident: Resident) -> None:
        """Let its name mean this version from now on."""
        with self._changed:
            old = self._newest.get(resident.name)
            self._newest[resident.name] = resident
            if old is not None and old is not resident:
                self._drop_unused(old)

    def unload(self, name: str) -> None:
        """Let ``name`` mean nothing from now on; who uses its version keeps it.

        Raises:
            AdapterNotFoundError: It means nothing already.
            ConfigError: It is ``"base"``.
        """
        if name == BASE:
            raise ConfigError(f"{BASE!r} cannot be unloaded")
        with self._changed:
            self._find(name)
            self._drop_unused(self._newest.pop(name))

    def find(self, name: str) -> Resident:
        """Return the newest version of ``name``, or the version that is called so.

        Raises:
            AdapterNotFoundError: There is none.
        """
        with self._changed:
            return self._find(name)

    def hold(self, name: str) -> Resident:
        """Return what :meth:`find` does, and keep it until :meth:`release`.

        Raises:
            AdapterNotFoundError: There is none.
        """
        with self._changed:
            found = self._find(name)
            self.try_hold(found)
            return found

    def try_hold(self, resident: Resident) -> bool:
        """Keep a version, if it is still there; return whether it is."""
        with self._changed:
            if not resident.gone:
                resident.uses += 1
                resident.used = next(_MOMENTS)
            return not resident.gone

    def release(self, resident: Resident) -> None:
        """End one use."""
        with self._changed:
            resident.uses -= 1
            self._drop_unused(resident)
            self._changed.notify_all()

    def last_use(self) -> int | None:
        """Return when a version was last taken (0: there is none), ``None`` if one is in use now."""
        with self._changed:
            here = self._here.values()
            return None if any(r.uses for r in here) else max((r.used for r in here), default=0)

    def evict_all(self) -> bool:
        """Let all versions go, unless one is in use; return whether they went."""
        with self._changed:
            if self.last_use() is None:
                return False
            for resident in list(self._here.values()):
                self._evict(resident)
            return True

    def _find(self, name: str) -> Resident:
        found = self._newest.get(name) or self._here.get(name)
        if found is None:
            known = ", ".join(sorted(self._newest))
            raise AdapterNotFoundError(f"no adapter {name!r} is loaded{suggest(name, self._newest)} (loaded: {known})")
        return found

    def _drop_unused(self, resident: Resident) -> None:
        if not resident.uses and self._newest.get(resident.name) is not resident:
            self._drop(resident)

    def _drop(self, resident: Resident) -> None:
        if not resident.gone:
            resident.gone = True
            del self._here[resident.version]
            self._session.unload_adapter(resident.version)
            self._on_drop(resident.version)
            if not self._here:
                self.on_empty()

    def _evict(self, idle: Resident) -> None:
        del self._newest[idle.name]  # what is idle is the newest of its name
        self._drop(idle)
        self.evictions += 1

    def _make_room(self, made: Resident, seconds: float) -> None:
        """Evict what was not used for longest until all that is left fits."""
        if self.max_bytes is None:
            return
        if made.bytes > self.max_bytes:
            raise AdapterMismatchError(
                f"adapter {made.name!r} takes {made.bytes} bytes, all adapters together may take {self.max_bytes}"
            )
        deadline = time.monotonic() + seconds
        with self._changed:
            while self.bytes > self.max_bytes:
                idle = [r for r in self._here.values() if not r.uses]
                if idle:
                    self._evict(min(idle, key=lambda r: r.used))
                elif (left := deadline - time.monotonic()) <= 0:
                    raise AdaptersFullError("every resident adapter is in use; try again later")
                else:
                    self._changed.wait(left)
