# SPDX-License-Identifier: BSD-3-Clause
"""Prompts of any lengths into a session's cache, a chunk at a time.

Knows token ids and positions; knows no text and no sampling.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from QEfficient.errors import ConfigError
from QEfficient.runtime.session import Session

Array = npt.NDArray[Any]


def prefill(
    session: Session, rows: Sequence[Array], *, chunk_len: int, starts: Sequence[int] | Array | None = None
) -> Array:
    """Write each row's tokens into its part of the cache and return the logits behind each row's last token.

    A chunk is as wide as its longest part, at most ``chunk_len``. A row that has nothing left repeats its last token at
    its last position, which writes the same key and value again.

    Args:
        session: A session allocated for ``len(rows)`` rows.
        rows: Token ids of each row, ``(n_b,)`` with ``n_b >= 1``.
        chunk_len: Most tokens of a row in one call.
        starts: Position of each row's first token; default: 0.

    Returns:
        Logits, ``(B, V)``.

    Raises:
        ConfigError: A row is empty, the number of rows is not the session's, or a row does not fit the context.
    """
    lengths = np.array([len(r) for r in rows])
    begin = np.zeros(len(rows), np.int64) if starts is None else np.asarray(starts, np.int64)
    _check(session, lengths, begin, chunk_len)
    done = np.zeros(len(rows), np.int64)
    last = np.zeros((len(rows), session.manifest.vocab_size), np.float32)
    while (done < lengths).any():
        first = np.minimum(done, lengths - 1)
        room = session.ctx_len - int((begin + first).max())
        width = min(chunk_len, room, int((lengths - done).max()))
        logits = session.run(*_chunk(rows, begin, first, width))
        reached = np.minimum(first + width, lengths)
        for row in np.flatnonzero(done < lengths):
            last[row] = logits[row, 0 if session.manifest.logits == "last" else reached[row] - first[row] - 1]
        done = reached
    return last


def _chunk(rows: Sequence[Array], begin: Array, first: Array, width: int) -> tuple[Array, Array]:
    """Return ``input_ids`` and ``position_ids`` of the next ``width`` tokens of each row."""
    ids = np.zeros((len(rows), width), np.int64)
    positions = np.full((len(rows), width), -1, np.int64)
    for b, row in enumerate(rows):
        part = row[first[b] : first[b] + width]
        ids[b, : len(part)] = part
        positions[b, : len(part)] = begin[b] + first[b] + np.arange(len(part))
    return ids, positions


def _check(session: Session, lengths: Array, begin: Array, chunk_len: int) -> None:
    if chunk_len < 1:
        raise ConfigError(f"chunk_len must be at least 1, not {chunk_len}")
    if len(lengths) != session.batch_size:
        raise ConfigError(f"{len(lengths)} rows given, the session is allocated for {session.batch_size}")
    if lengths.min() < 1:
        raise ConfigError(f"row {int(lengths.argmin())} is empty: a prompt needs at least one token")
    ends = begin + lengths
    if ends.max() > session.ctx_len:
        row = int(ends.argmax())
        raise ConfigError(
            f"the context does not fit: row {row} has {lengths[row]} tokens from position {begin[row]} on, "
            f"the cache holds {session.ctx_len}"
        )
