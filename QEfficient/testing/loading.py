# SPDX-License-Identifier: BSD-3-Clause
"""What it costs to load an engine: time, and memory of the process."""

import time
from types import TracebackType

import psutil


class Loading:
    """Adds up over ``with`` blocks.

    Attributes:
        seconds: How long they took.
        grown: By how many bytes the memory that the process holds grew, files mapped into it included.
    """

    def __init__(self) -> None:
        self.seconds, self.grown = 0.0, 0

    def __enter__(self) -> "Loading":
        self._held, self._begin = _held(), time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds += time.perf_counter() - self._begin
        self.grown += _held() - self._held


def _held() -> int:
    return int(psutil.Process().memory_info().rss)
