# SPDX-License-Identifier: BSD-3-Clause
"""Arrays that begin where a line of the cache does: NumPy's begin 16 bytes behind one, and every other load would touch two."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

LINE = 64
"""Bytes of a line of the cache."""


def zeros(shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
    """Return zeros; the system provides their memory when it is first written."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(count + LINE, np.uint8)
    offset = -raw.ctypes.data % LINE
    return raw[offset : offset + count].view(dtype).reshape(shape)


def copied(array: Array, dtype: npt.DTypeLike) -> Array:
    """Return a contiguous copy of another type."""
    copy = zeros(array.shape, dtype)
    copy[...] = array
    return copy
