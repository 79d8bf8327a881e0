# SPDX-License-Identifier: BSD-3-Clause
"""Large pages: what was mapped in the context is on them, with the same content, and nothing else is."""

import ctypes
import mmap
import re
import threading
from pathlib import Path

import pytest

from QEfficient.runtime import pages
from QEfficient.runtime.pages import _without, on_large_pages, why_not

_MIB = 1 << 20


def _mapped(byte: bytes) -> mmap.mmap:
    memory = mmap.mmap(-1, 16 * _MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = byte * len(memory)
    return memory


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _large_kib(memory: mmap.mmap) -> int:
    """Return how much of the mapping around ``memory`` is on large pages; mappings side by side are one."""
    at = _address(memory)
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= at < int(span[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1])
    raise AssertionError("no such mapping")


@pytest.mark.skipif(bool(why_not()), reason="this system has no transparent large pages, or they are switched off")
def test_what_is_mapped_inside_is_put_on_large_pages(caplog: pytest.LogCaptureFixture) -> None:
    """The content stays; it is at least half of 16 MiB, whatever the alignment; nothing is said."""
    first = _mapped(b"y")
    aligned = -(-_address(first) // pages._PAGE_BYTES) * pages._PAGE_BYTES
    if not pages._advise(aligned, 14 * _MIB):
        pytest.skip("the memory of this system is in too many pieces for large pages just now")
    with on_large_pages():
        memory = _mapped(b"x")
        before = _large_kib(memory)
    assert _large_kib(memory) >= before + 8 * 1024
    assert memory[:] == b"x" * len(memory)
    assert caplog.messages == []


def test_a_system_without_large_pages_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Switched off, absent, or beyond the kernel: one warning each that says which, and the memory is as it was."""
    setting = tmp_path / "enabled"
    setting.write_text("always madvise [never]\n")
    monkeypatch.setattr(pages, "_SETTING", setting)
    with on_large_pages():
        memory = _mapped(b"x")
    assert memory[:] == b"x" * len(memory)
    assert caplog.messages.pop() == (
        f"large pages change nothing here: they are switched off ({setting} says 'always madvise [never]'); "
        f"'echo madvise > {setting}' as root allows them"
    )
    monkeypatch.setattr(pages, "_SETTING", tmp_path / "absent")
    assert why_not() == f"this kernel has none ({tmp_path / 'absent'} cannot be read)"
    setting.write_text("always [madvise] never\n")
    monkeypatch.setattr(pages, "_SETTING", setting)
    monkeypatch.setattr(pages, "_MADV_COLLAPSE", 14)  # MADV_HUGEPAGE, which each kernel that has them knows
    assert why_not() == ""
    monkeypatch.setattr(pages, "_MADV_COLLAPSE", 9999)  # what a kernel before 6.1 makes of 25
    caplog.clear()
    with on_large_pages():
        memory = _mapped(b"x")
    assert caplog.messages == [
        "large pages change nothing here: the kernel cannot move memory onto them (Linux 6.1 and later can)"
    ]
    assert memory[:] == b"x" * len(memory)


@pytest.mark.skipif(bool(why_not()), reason="this system has no transparent large pages, or they are switched off")
def test_what_cannot_be_on_large_pages_is_no_reason_to_complain(caplog: pytest.LogCaptureFixture) -> None:
    """Stacks cannot, since Linux 6.7; a model may be so small that threads' stacks are all that was mapped."""
    ends = threading.Event()
    with on_large_pages():
        thread = threading.Thread(target=ends.wait)
        thread.start()
    ends.set()
    thread.join()
    assert caplog.messages == []


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
