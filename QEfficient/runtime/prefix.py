# SPDX-License-Identifier: BSD-3-Clause
"""Prompts whose beginning was computed before with the same adapter, a system prompt for example, begin with a copy of it.

What the cache holds for a token depends on that token, those before it and the adapter, so what one prompt left serves every prompt that
begins alike, as far as they agree. A recurrent state has no positions: it serves prompts that begin with the whole one.
Knows token ids and adapters' names; an adapter that is loaded anew under its name must be forgotten here first.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from QEfficient.contract import Manifest
from QEfficient.errors import ConfigError
from QEfficient.runtime.session import filled_part

Array = npt.NDArray[Any]


class Rows(Protocol):
    """What a prefix needs of a session."""

    manifest: Manifest

    def read_row(self, row: int, length: int) -> dict[str, Array]:
        """Return a copy of the first ``length`` positions of a row's state."""

    def write_row(self, row: int, parts: Mapping[str, Array]) -> None:
        """Put what :meth:`read_row` returned at the beginning of a row."""


class Prefixes:
    """States behind prompts, bounded in bytes; the one that was used longest ago goes first. Safe to share between threads.

    Args:
        max_bytes: Most bytes to keep.

    Raises:
        ConfigError: ``max_bytes`` is not positive.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 1:
            raise ConfigError(f"max_bytes must be at least 1, not {max_bytes}")
        self.max_bytes, self.bytes = max_bytes, 0
        self._kept: OrderedDict[tuple[str, bytes], dict[str, Array]] = OrderedDict()
        self._lock = threading.Lock()

    def keep(
        self, session: Rows, row: int, adapter: str, tokens: Sequence[int] | Array, *, virtual_tokens: int = 0
    ) -> None:
        """Keep what a row holds behind ``tokens``, its first ones, which it computed with ``adapter``.

        Args:
            session: Where the row is.
            row: Which.
            adapter: Its name, or that of its version.
            tokens: The row's first tokens.
            virtual_tokens: Entries in front of them that ``session`` does not count itself.

        Raises:
            ConfigError: It takes more than ``max_bytes`` on its own, or there are no tokens. Nothing has changed then.
        """
        ids = np.asarray(tokens, np.int64)
        if ids.ndim != 1 or not ids.size:
            raise ConfigError(f"a prefix is a row of at least one token, not of shape {ids.shape}")
        parts = session.read_row(row, virtual_tokens + ids.size)
        size = _size(parts)
        if size > self.max_bytes:
            raise ConfigError(
                f"the state behind a prefix of {ids.size} tokens takes {size} bytes, at most {self.max_bytes} are kept; "
                "shorten the prefix or raise max_bytes"
            )
        with self._lock:
            self._forget((adapter, ids.tobytes()))
            while self._kept and self.bytes + size > self.max_bytes:
                self._forget(next(iter(self._kept)))
            self._kept[adapter, ids.tobytes()] = parts
            self.bytes += size

    def restore(self, session: Rows, row: int, adapter: str, tokens: Sequence[int] | Array) -> int:
        """Begin a row with what is kept of the longest beginning of ``tokens`` that leaves at least one to compute.

        Returns:
            How many tokens that are, 0 if none.
        """
        ids = np.asarray(tokens, np.int64)
        whole = any("ctx_len" not in spec.shape for spec in session.manifest.states)
        with self._lock:
            shared = {key: _shared(ids, key[1], whole) for key in self._kept if key[0] == adapter}
            key = max(shared, key=shared.__getitem__, default=None)
            if key is None or not shared[key]:
                return 0
            self._kept.move_to_end(key)
            parts, unused = self._kept[key], len(key[1]) // 8 - shared[key]
        session.write_row(row, _shortened(session.manifest, parts, unused) if unused else parts)
        return shared[key]

    def forget(self, adapter: str) -> None:
        """Drop every prefix of an adapter; call it when the adapter is unloaded or replaced."""
        with self._lock:
            for key in [k for k in self._kept if k[0] == adapter]:
                self._forget(key)

    def _forget(self, key: tuple[str, bytes]) -> None:
        self.bytes -= _size(self._kept.pop(key, {}))


def _shared(ids: Array, kept: bytes, whole: bool) -> int:
    """Return how many of the kept tokens ``ids`` begins with, at most all but its last one."""
    other = np.frombuffer(kept, np.int64)
    length = min(len(ids) - 1, len(other))
    differ = np.flatnonzero(ids[:length] != other[:length])
    same = int(differ[0]) if differ.size else length
    return same if same == len(other) or not whole else 0


def _shortened(manifest: Manifest, parts: Mapping[str, Array], unused: int) -> dict[str, Array]:
    """Return the parts without their last positions."""
    length = {s.name: parts[s.name].shape[s.shape.index("ctx_len") - 1] - unused for s in manifest.states}
    return {s.name: parts[s.name][filled_part(s, length[s.name])] for s in manifest.states}


def _size(parts: Mapping[str, Array]) -> int:
    return sum(part.nbytes for part in parts.values())
