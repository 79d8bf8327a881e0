# SPDX-License-Identifier: BSD-3-Clause
"""Weights on large pages of memory.

A token reads every weight once. On pages of 4 KiB the processor looks up an address for each of them, twice in a virtual machine;
on pages of 2 MiB hardly ever. ONNX Runtime does not ask the system for large pages, so that is done afterwards, for
the memory that was mapped while it loaded. Results are the same; nothing happens where it cannot be done.
"""

import ctypes
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_MADV_COLLAPSE = 25  # Linux 6.1; others answer with an error, which is ignored
_PAGE_BYTES = 2 << 20
_STEP_PAGES = 16
_MOST_SECONDS_OF_A_STEP = 1.0
"""A step takes a hundredth of that, unless memory is in so many pieces that the system has to search for large pages."""

Span = tuple[int, int]


@contextmanager
def on_large_pages() -> Iterator[None]:
    """Put what is mapped in this context on large pages when it ends."""
    before = _spans()
    yield
    if before and _allowed():
        _collapse(_without(_spans(), before))


def _collapse(spans: Sequence[Span]) -> None:
    """Ask for large pages in spans of addresses; memory that is not there any more is skipped by the system."""
    advise = ctypes.CDLL(None).madvise
    step = _STEP_PAGES * _PAGE_BYTES
    for first, last in spans:
        begin, end = -(-first // _PAGE_BYTES) * _PAGE_BYTES, last // _PAGE_BYTES * _PAGE_BYTES
        for address in range(begin, end, step):
            started = time.monotonic()
            advise(ctypes.c_void_p(address), ctypes.c_size_t(min(step, end - address)), _MADV_COLLAPSE)
            if time.monotonic() - started > _MOST_SECONDS_OF_A_STEP:
                return


def _allowed() -> bool:
    """Whether the system has large pages, and its administrator did not switch them off."""
    try:
        return "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return False


def _spans() -> list[Span]:
    """Return the addresses of this process's private memory that belongs to no file, in order; none outside Linux."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        addresses, access, _, _, inode, *_ = line.split()
        if access == "rw-p" and inode == "0" and "[stack]" not in line:
            first, last = addresses.split("-")
            found.append((int(first, 16), int(last, 16)))
    return found


def _without(spans: Sequence[Span], taken: Sequence[Span]) -> list[Span]:
    """Return the parts of ``spans`` that are not in ``taken``; both are in order."""
    left = []
    for first, last in spans:
        for begin, end in taken:
            if end <= first or begin >= last:
                continue
            if begin > first:
                left.append((first, begin))
            first = max(first, end)
        if first < last:
            left.append((first, last))
    return left
