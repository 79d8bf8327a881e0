# SPDX-License-Identifier: BSD-3-Clause
"""Adapters come and go: in the background, within their memory, checked, replaced at once, and none stops another."""

import shutil
import threading
from pathlib import Path

import pytest

from QEfficient.errors import AdapterMismatchError, AdapterNotFoundError, AdaptersFullError, ConfigError
from QEfficient.serve.entries import State
from QEfficient.serve.registry import Registry
from QEfficient.serve.server import Server
from tests.serve.conftest import Place, tokens


def states(registry: Registry) -> dict[str, State]:
    """Return where each adapter is."""
    return {e.name: e.state for e in registry.entries()}


def test_adapters_are_evicted_and_come_back_the_same(server: Server, registry: Registry) -> None:
    """Room for two of three: the one unused for longest goes, is loaded again when asked for, and answers as before."""
    evictions = registry.residents.evictions  # of the server that tests share
    with registry.acquire("one") as lease:
        before = tokens(server, lease.version)
    for name in ("two", "three"):
        registry.acquire(name).release()
    sizes = {e.name: e.resident.bytes for e in registry.entries() if e.resident}
    registry.residents.max_bytes = sizes["one"] + max(sizes["two"], sizes["three"])
    registry.residents.unload("three")
    registry.acquire("three").release()
    assert states(registry) == {"one": State.REGISTERED, "two": State.RESIDENT, "three": State.RESIDENT}
    assert registry.residents.evictions == evictions + 1
    assert registry.residents.bytes <= registry.residents.max_bytes
    with registry.acquire("one") as lease:
        assert tokens(server, lease.version) == before
    assert (registry.counts.misses, registry.counts.loads, registry.counts.hits) == (5, 5, 0)
    assert {e.name: e.loads for e in registry.entries()} == {"one": 2, "two": 1, "three": 2}


def test_a_version_is_replaced_while_requests_of_the_old_one_finish(
    server: Server, registry: Registry, place: Place
) -> None:
    """Who holds the old version goes on with it; whoever asks later gets the new one; then the old one's memory is free."""
    old = registry.acquire("one")
    before = tokens(server, old.version)
    registry.load("one", place.adapters / "two", replace=True)
    new = registry.acquire("one")
    assert tokens(server, old.version) == before != tokens(server, new.version)
    with registry.acquire("two") as two:
        assert tokens(server, new.version) == tokens(server, two.version)
    held = registry.residents.bytes
    old.release()
    assert registry.residents.bytes < held
    with pytest.raises(AdapterNotFoundError):
        tokens(server, old.version)
    new.release()
    with pytest.raises(ConfigError, match="there already is an adapter 'one'"):
        registry.load("one", place.adapters / "three")
    registry.unregister("one")
    with pytest.raises(AdapterNotFoundError):
        registry.ask("one")


def test_a_bad_adapter_is_refused_and_the_others_go_on(server: Server, registry: Registry, place: Place) -> None:
    """A damaged file, found when first asked for: that name is refused each time, with the reason; the others answer."""
    folder = place.adapters / "cut"
    shutil.copytree(place.adapters / "one", folder)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    registry.register("cut", folder)
    asked = registry.ask("cut")
    with registry.acquire("two") as lease:
        assert len(tokens(server, lease.version)) == 6
    for _ in range(2):
        with pytest.raises(AdapterMismatchError, match=r"'cut' is not served: .*damaged"):
            (asked.result(600) if not asked.done() else registry.acquire("cut")).release()
    assert states(registry)["cut"] is State.REFUSED
    with pytest.raises(AdapterMismatchError, match="damaged"):
        registry.load("two", folder, replace=True)
    with registry.acquire("two") as lease:
        assert len(tokens(server, lease.version)) == 6
    shutil.copytree(place.adapters / "one", folder, dirs_exist_ok=True)
    registry.load("cut", folder, replace=True)
    registry.acquire("cut").release()


def test_files_that_change_are_not_served_unchecked(registry: Registry, place: Place) -> None:
    """An adapter whose file is another one when it is loaded again is refused until somebody loads it on purpose."""
    folder = place.adapters / "changing"
    shutil.copytree(place.adapters / "one", folder)
    registry.register("changing", folder)
    registry.acquire("changing").release()
    registry.residents.unload("changing")
    shutil.copy(place.adapters / "three" / "adapter_model.safetensors", folder)
    with pytest.raises(AdapterMismatchError, match="changed since they were checked"):
        registry.acquire("changing")


def test_who_waits_in_vain_leaves_nothing(registry: Registry, place: Place) -> None:
    """With all memory in use a load is given up in time; a lease that nobody waits for any more is not kept."""
    held = registry.acquire("two")
    registry.residents.max_bytes = held.resident.bytes
    registry.seconds = 0.05
    with pytest.raises(AdaptersFullError, match="in use"):
        registry.acquire("one", seconds=600)
    held.release()
    registry.seconds = 600.0
    registry.source = slow = Slow(registry.source, place.adapters / "one")  # type: ignore[assignment]
    registry.register("far", "far/away")
    assert registry.ask("far").cancel()  # before it can have come
    slow.arrives.set()
    registry.acquire("far").release()  # it comes for both
    assert states(registry)["far"] is State.RESIDENT
    assert all(e.resident.uses == 0 for e in registry.entries() if e.resident)
    registry.acquire("three").release()
    assert states(registry)["three"] is State.RESIDENT


class Slow:
    """A source whose place ``far/away`` takes its time."""

    def __init__(self, source: object, there: Path) -> None:
        self.source, self.there = source, there
        self.arrives = threading.Event()

    def __getattr__(self, name: str) -> object:
        return getattr(self.source, name)

    def fetch(self, place: str | Path) -> Path:
        """Wait for what is far away."""
        if str(place) != "far/away":
            return Path(place)
        assert self.arrives.wait(600)
        return self.there


def test_a_slow_download_holds_up_nobody(server: Server, registry: Registry, place: Place) -> None:
    """While one adapter is on its way, others load and answer; then all who wait for it are served, by one load."""
    registry.source = slow = Slow(registry.source, place.adapters / "two")  # type: ignore[assignment]
    registry.register("far", "far/away")
    asked = [registry.ask("far") for _ in range(3)]
    assert states(registry)["far"] is State.LOADING
    with registry.acquire("one") as lease:
        assert len(tokens(server, lease.version)) == 6
    assert not any(a.done() for a in asked)
    slow.arrives.set()
    leases = [a.result(600) for a in asked]
    assert {lease.version for lease in leases} == {leases[0].version}
    assert leases[0].resident.uses == 3
    for lease in leases:
        lease.release()
    assert {e.name: e.loads for e in registry.entries()}["far"] == 1


def test_an_adapter_from_the_hub(
    server: Server, registry: Registry, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Hub id that cannot be had now is refused with the reason; once it is to be had, the same name is served."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    registry.register("hub", "someone/adapter")
    with pytest.raises(AdapterMismatchError, match="nor to be had from the Hub"):
        registry.acquire("hub")
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--adapter"
    shutil.copytree(place.adapters / "two", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    with registry.acquire("hub") as hub, registry.acquire("two") as two:
        assert tokens(server, hub.version) == tokens(server, two.version)
