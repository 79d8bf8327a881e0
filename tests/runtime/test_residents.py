# SPDX-License-Identifier: BSD-3-Clause
"""Versions of adapters in a session, and the memory that they may take."""

import threading

import numpy as np
import pytest

from QEfficient.errors import AdapterMismatchError, AdapterNotFoundError, AdaptersFullError, ConfigError
from QEfficient.runtime.residents import Residents
from QEfficient.runtime.slots import SlotSession


@pytest.fixture
def session(tiny):
    """Open the tiny program."""
    return SlotSession(tiny.program, threads=1)


@pytest.fixture
def size(tiny, session):
    """Return what one adapter takes."""
    residents = Residents(session)
    residents.load("one", tiny.adapters["one"])
    found = residents.bytes
    residents.unload("one")
    assert residents.bytes == 0
    return found


def test_the_one_unused_for_longest_goes_first(tiny, session, size):
    """Room for two: the third takes the place of the older one, unless that was used since, or is in use."""
    dropped = []
    residents = Residents(session, max_bytes=2 * size, on_drop=dropped.append)
    residents.load("a", tiny.adapters["one"])
    residents.load("b", tiny.adapters["one"])
    residents.release(residents.hold("a"))
    residents.load("c", tiny.adapters["one"])
    assert (residents.names, residents.evictions, residents.bytes, dropped) == (("a", "c"), 1, 2 * size, ["b@2"])
    held = residents.hold("a")
    residents.load("d", tiny.adapters["one"])
    assert residents.names == ("a", "d")
    assert session.adapters == ("a@1", "d@4")
    residents.release(held)


def test_what_is_in_use_is_not_evicted(tiny, session, size):
    """One more adapter waits for memory, comes when it is given back, and is refused without trace when it is not."""
    residents = Residents(session, max_bytes=size)
    residents.load("a", tiny.adapters["one"])
    held = residents.hold("a")
    with pytest.raises(AdaptersFullError, match="every resident adapter is in use"):
        residents.load("b", tiny.adapters["one"], seconds=0.05)
    assert (residents.names, session.adapters) == (("a",), ("a@1",))
    timer = threading.Timer(0.1, residents.release, [held])
    timer.start()
    residents.load("b", tiny.adapters["one"], seconds=600)
    assert residents.names == ("b",)
    timer.join()


def test_a_version_stays_as_long_as_it_is_held(tiny, session):
    """Replaced or unloaded, it can still be asked for by its own name; given back, it is gone."""
    residents = Residents(session)
    residents.load("a", tiny.adapters["one"])
    old = residents.hold("a")
    residents.load("a", tiny.adapters["two"])
    assert residents.find("a").version == "a@2"
    assert residents.find("a@1") is old
    residents.unload("a")
    assert session.adapters == ("a@1",)
    residents.release(old)
    assert (old.gone, session.adapters, residents.try_hold(old)) == (True, (), False)
    with pytest.raises(AdapterNotFoundError, match="'a@1'"):
        residents.find("a@1")


def test_who_wants_to_know_is_told_when_the_last_has_gone(tiny, session, size):
    """Once for each time that none is left; not when one makes room for another, and not while somebody uses the last."""
    told = []
    residents = Residents(session, max_bytes=size)
    residents.on_empty = lambda: told.append(len(residents))
    residents.load("a", tiny.adapters["one"])
    residents.load("b", tiny.adapters["one"])
    residents.load("b", tiny.adapters["two"])
    assert told == []
    held = residents.hold("b")
    residents.unload("b")
    assert told == []
    residents.release(held)
    assert told == [0]


def test_what_cannot_be_an_adapter(tiny, session, size):
    """Names that mean something, values that are not finite, tensors larger than all may be: refused, nothing stays."""
    residents = Residents(session, max_bytes=size - 1)
    for name in ("base", "a@1"):
        with pytest.raises(ConfigError, match="choose another name"):
            residents.load(name, tiny.adapters["one"])
    first = next(iter(tiny.adapters["one"]))
    bad = {**tiny.adapters["one"], first: np.full_like(tiny.adapters["one"][first], np.nan)}
    with pytest.raises(AdapterMismatchError, match="not finite"):
        residents.load("a", bad)
    with pytest.raises(AdapterMismatchError, match=f"takes {size} bytes, all adapters together may take {size - 1}"):
        residents.load("a", tiny.adapters["one"])
    assert (len(residents), session.adapters) == (0, ())
