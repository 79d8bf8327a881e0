# SPDX-License-Identifier: BSD-3-Clause
"""How our products in blocks want an adapter: its matrices in numbers of 8 bits, with a scale for each rank.

The scale stands in the first bytes of a tail behind the rank's numbers, so a tensor can be joined with others, transposed and cut along its
ranks with its scales, and what fills up ranks, zeros, has none. Knows arrays only.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

TAIL = 64
"""Bytes behind the numbers of a rank: a line of the cache, so what follows begins where one does."""

_LARGEST = 127


def in_bytes(matrix: Array, rank_axis: int) -> Array:
    """Return a matrix of floats, one of whose axes is the rank, as int8: ``TAIL`` longer along the other axis.

    What is not finite makes its rank's scale infinite or NaN, and so what the rank adds.
    """
    ranks = np.moveaxis(np.asarray(matrix, np.float32), rank_axis, 0)  # (r, n)
    scales = np.abs(ranks).max(1, initial=0) / np.float32(_LARGEST)
    finite = np.isfinite(scales)
    usable = finite & (scales > 0)
    made = np.zeros((ranks.shape[0], ranks.shape[1] + TAIL), np.int8)
    numbers = made[:, :-TAIL]
    numbers[usable] = np.rint(ranks[usable] / scales[usable, None])
    numbers[~finite] = 1
    made[:, -TAIL : -TAIL + 4] = scales[:, None].view(np.int8)
    return np.moveaxis(made, 0, rank_axis)


def from_bytes(matrix: Array, rank_axis: int) -> Array:
    """Return the matrix of float32 that int8 numbers with their scales stand for."""
    ranks = np.moveaxis(matrix, rank_axis, 0)
    scales = np.ascontiguousarray(ranks[:, -TAIL : -TAIL + 4]).view(np.float32)
    return np.moveaxis(ranks[:, :-TAIL] * scales, 0, rank_axis)
