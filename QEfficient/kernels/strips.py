# SPDX-License-Identifier: BSD-3-Clause
"""How our products want weights in blocks: in strips of 16 rows, of which four bytes each stand side by side.

A register that is loaded has lanes of different rows then: all are multiplied by the same numbers, and sums need not be gathered from
lanes. What fills the last strip is zeros. Knows arrays only.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

STRIP = 16
"""Rows of a strip."""


def count_strips(rows: int) -> int:
    """Return how many strips so many rows are."""
    return -(-rows // STRIP)


def in_strips(parts: Array) -> Array:
    """Return what each row has several of, ``(N, n)``, as ``(strips, n, 16)``."""
    rows, count = parts.shape
    filled = np.pad(parts, ((0, -rows % STRIP), (0, 0)))
    return np.ascontiguousarray(filled.reshape(-1, STRIP, count).transpose(0, 2, 1))


def data_in_strips(data: Array) -> Array:
    """Return the bytes of rows in blocks, ``(N, blocks, bytes)``, as ``(strips, blocks * bytes / 4, 16, 4)``."""
    quads = np.ascontiguousarray(data).reshape(len(data), -1).view(np.uint32)
    return in_strips(quads).view(np.uint8).reshape(-1, quads.shape[1], STRIP, 4)
