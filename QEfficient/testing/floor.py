# SPDX-License-Identifier: BSD-3-Clause
"""What this machine can do at best, measured in the same run: reading memory, and multiplying matrices.

Decoding one row reads every weight once for each token, so it cannot be faster than memory; a long prompt is bound by
multiplications. How far an engine is from either says what is left to gain.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_BYTES = 1 << 28
_SIDE = 1024
_TURNS = 4


@dataclass(frozen=True, slots=True)
class Machine:
    """The best of a few turns.

    Attributes:
        bandwidth: Bytes per second that a product of matrix and vector, a sum or a maximum reads, whichever is faster.
        peak: Floating-point operations per second of a product of square float32 matrices.
    """

    bandwidth: float
    peak: float

    @classmethod
    def measured(cls) -> "Machine":
        """Measure both, in about a second."""
        numbers = torch.ones(_BYTES // 4 // _SIDE, _SIDE)
        vector, row = torch.ones(_SIDE), torch.ones(1, _BYTES // 4 // _SIDE)
        ways = (lambda: numbers @ vector, lambda: row @ numbers, numbers.sum, numbers.max)
        seconds = min(_seconds(way) for _ in range(_TURNS) for way in ways)
        square = torch.ones(_SIDE, _SIDE)
        best = min(_seconds(lambda: square @ square) for _ in range(2 * _TURNS))
        return cls(_BYTES / seconds, 2 * _SIDE**3 / best)

    def decode_seconds(self, read: int) -> float:
        """Return the least time of a token that reads so many bytes."""
        return read / self.bandwidth

    def prefill_seconds(self, parameters: int, tokens: int) -> float:
        """Return the least time of a prompt: two operations for each token and weight, attention left out."""
        return 2 * parameters * tokens / self.peak


def _seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
