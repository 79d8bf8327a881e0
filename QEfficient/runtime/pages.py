# SPDX-License-Identifier: BSD-3-Clause
"""Weights on large pages of memory.

A token reads every weight once. On pages of 4 KiB the processor looks up an address for each of them, twice in a virtual machine;
on pages of 2 MiB hardly ever. ONNX Runtime does not ask the system for large pages, so that is done afterwards, for
the memory that was mapped while it loaded. Results are the same; where it cannot be done, a warning says why.
"""

import ctypes
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

LOGGER = logging.getLogger("qefficient.pages")

_MADV_COLLAPSE = 25
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_PAGE_BYTES = 2 << 20
_STEP_PAGES = 16
_MOST_SECONDS_OF_A_STEP = 1.0
"""A step takes a hundredth of that, unless memory is in so many pieces that the system has to search for large pages."""

Span = tuple[int, int]


@contextmanager
def on_large_pages() -> Iterator[None]:
    """Put what is mapped in this context on large pages when it ends; warn where the system has none."""
    reason = why_not()
    if reason:
        yield
        LOGGER.warning("large pages change nothing here: %s", reason)
        return
    before = _spans()
    yield
    _collapse(_without(_spans(), before))


def why_not() -> str:
    """Return why this system gives no large pages; empty if it has them."""
    if sys.platform != "linux":
        return f"they are asked for on Linux only, this is {sys.platform}"
    try:
        setting = _SETTING.read_text().strip()
    except OSError:
        return f"this kernel has none ({_SETTING} cannot be read)"
    if "[never]" in setting:
        return f"they are switched off ({_SETTING} says {setting!r}); 'echo madvise > {_SETTING}' as root allows them"
    if not _advise(0, 0):  # of no memory at all: refused only by who does not know what is asked
        return "the kernel cannot move memory onto them (Linux 6.1 and later can)"
    return ""


def _advise(address: int, length: int) -> bool:
    advise = ctypes.CDLL(None).madvise
    return bool(advise(ctypes.c_void_p(address), ctypes.c_size_t(length), _MADV_COLLAPSE) == 0)


def _collapse(spans: Sequence[Span]) -> None:
    """Ask for large pages in spans of addresses; what is not there any more, or cannot be on them (stacks), is skipped by the system."""
    step = _STEP_PAGES * _PAGE_BYTES
    for first, last in spans:
        begin, end = -(-first // _PAGE_BYTES) * _PAGE_BYTES, last // _PAGE_BYTES * _PAGE_BYTES
        for address in range(begin, end, step):
            started = time.monotonic()
            _advise(address, min(step, end - address))
            if time.monotonic() - started > _MOST_SECONDS_OF_A_STEP:
                return


def _spans() -> list[Span]:
    """Return the addresses of this process's private memory that belongs to no file, in order."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
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
