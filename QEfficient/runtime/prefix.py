# SPDX-License-Identifier: BSD-3-Clause
"""Prefixes that many prompts share, a system prompt for example, computed once for each adapter.

What the cache holds behind a prefix depends on its tokens and the adapter only, so it is copied instead of computed again. Knows
token ids and adapters' names; an adapter that is loaded anew under its name must be forgotten here first.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from QEfficient.errors import ConfigError

Array = npt.NDArray[Any]


class Rows(Protocol):
    """What a prefix needs of a session."""

    def read_row(self, row: int, length: int) -> dict[str, Array]:
        """Return a copy of the first ``length`` positions of a row's state."""

    def write_row(self, row: int, parts: Mapping[str, Array]) -> None:
        """Put what :meth:`read_row` returned at the beginning of a row."""


class Prefixes:
    """States behind prefixes, bounded in bytes; the one that was used longest ago goes first. Safe to share between threads.

    Args:
        max_bytes: Most bytes to keep.

    Raises:
        ConfigError: ``max_bytes`` is not positive.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 1:
            raise ConfigError(f"max_bytes must be at least 1, not {max_bytes}")
        self.max_bytes = max_bytes
        self._kept: OrderedDict[tuple[str, bytes], dict[str, Array]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        """What is kept, in bytes."""
        return sum(_size(parts) for parts in self._kept.values())

    def keep(self, session: Rows, row: int, adapter: str, tokens: Sequence[int] | Array) -> None:
        """Keep what a row holds behind ``tokens``, its first ones, which it computed with ``adapter``.

        Raises:
            ConfigError: It takes more than ``max_bytes`` on its own, or there are no tokens. Nothing has changed then.
        """
        ids = np.asarray(tokens, np.int64)
        if ids.ndim != 1 or not ids.size:
            raise ConfigError(f"a prefix is a row of at least one token, not of shape {ids.shape}")
        parts = session.read_row(row, ids.size)
        size = _size(parts)
        if size > self.max_bytes:
            raise ConfigError(
                f"the state behind a prefix of {ids.size} tokens takes {size} bytes, at most {self.max_bytes} are kept; "
                "shorten the prefix or raise max_bytes"
            )
        with self._lock:
            self._kept.pop((adapter, ids.tobytes()), None)
            while self._kept and self.bytes + size > self.max_bytes:
                self._kept.popitem(last=False)
            self._kept[adapter, ids.tobytes()] = parts

    def restore(self, session: Rows, row: int, adapter: str, tokens: Sequence[int] | Array) -> int:
        """Fill a row with the longest kept prefix of ``tokens`` that leaves at least one to compute; return its length, 0 if none."""
        ids = np.asarray(tokens, np.int64)
        with self._lock:
            lengths = sorted({len(key) // 8 for name, key in self._kept if name == adapter}, reverse=True)
            for length in (n for n in lengths if n < ids.size):
                parts = self._kept.get((adapter, ids[:length].tobytes()))
                if parts is not None:
                    self._kept.move_to_end((adapter, ids[:length].tobytes()))
                    session.write_row(row, parts)
                    return length
        return 0

    def forget(self, adapter: str) -> None:
        """Drop every prefix of an adapter; call it when the adapter is unloaded or replaced."""
        with self._lock:
            for key in [k for k in self._kept if k[0] == adapter]:
                del self._kept[key]


def _size(parts: Mapping[str, Array]) -> int:
    return sum(part.nbytes for part in parts.values())
