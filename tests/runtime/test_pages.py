# SPDX-License-Identifier: BSD-3-Clause
"""Large pages: what was mapped in the context is on them, with the same content, and nothing else is."""

import ctypes
import mmap
import re
from pathlib import Path

import pytest

from QEfficient.runtime.pages import _allowed, _without, on_large_pages

_MIB = 1 << 20


def _mapped(byte: bytes) -> mmap.mmap:
    memory = mmap.mmap(-1, 16 * _MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = byte * len(memory)
    return memory


def _large_kib(memory: mmap.mmap) -> int:
    """Return how much of the mapping around ``memory`` is on large pages; mappings side by side are one."""
    at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= at < int(span[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1])
    raise AssertionError("no such mapping")


@pytest.mark.skipif(not _allowed(), reason="this system has no transparent large pages, or they are switched off")
def test_what_is_mapped_inside_is_put_on_large_pages() -> None:
    """The content stays; it is at least half of 16 MiB, whatever the alignment."""
    with on_large_pages():
        memory = _mapped(b"x")
        before = _large_kib(memory)
    assert _large_kib(memory) >= before + 8 * 1024
    assert memory[:] == b"x" * len(memory)


@pytest.mark.parametrize(
    ("spans", "taken", "left"),
    [
        ([(0, 10)], [], [(0, 10)]),
        ([(0, 10)], [(0, 10)], []),
        ([(0, 10)], [(2, 4), (6, 8)], [(0, 2), (4, 6), (8, 10)]),
        ([(4, 10), (20, 30)], [(0, 6), (12, 14), (25, 40)], [(6, 10), (20, 25)]),
    ],
)
def test_memory_that_was_there_before_is_left_alone(
    spans: list[tuple[int, int]], taken: list[tuple[int, int]], left: list[tuple[int, int]]
) -> None:
    """Spans minus spans."""
    assert _without(spans, taken) == left
