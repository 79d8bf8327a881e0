# SPDX-License-Identifier: BSD-3-Clause
"""Adapter files laid out once, then mapped; rows read and written; prefixes computed once."""

import os

import numpy as np
import pytest
from safetensors.numpy import load_file as read_safetensors
from safetensors.numpy import save_file

from QEfficient.errors import AdapterMismatchError, ConfigError
from QEfficient.runtime.laid_out import LAID_OUT_DIR, load_file
from QEfficient.runtime.prefill import prefill
from QEfficient.runtime.prefix import Prefixes
from QEfficient.runtime.session import OrtSession

IDS = np.random.default_rng(0).integers(1, 97, 24)


@pytest.fixture
def source(tiny, tmp_path):
    """Write an adapter's file."""
    save_file(tiny.adapters["one"], tmp_path / "one.safetensors")
    return tmp_path / "one.safetensors"


def _logits(session, name):
    session.set_adapter(name)
    session.allocate(1, 32)
    return session.run(IDS[None], np.arange(24)[None])


def _clean(session):
    for file in (session.folder / LAID_OUT_DIR).glob("*"):
        file.unlink()


def test_mapped_equals_loaded(tiny, session, source):
    """The second load maps a file, and gives the same logits to the bit; nothing is copied."""
    _clean(session)
    session.load_adapter("plain", tiny.adapters["one"])
    assert not load_file(session, "first", source, lambda: read_safetensors(source))
    assert load_file(session, "second", source, lambda: pytest.fail("the file was read"))
    for name in ("first", "second"):
        np.testing.assert_array_equal(_logits(session, name), _logits(session, "plain"))
    assert all(not t.flags.owndata for t in session.placed_adapter("second").values())
    kept = next((session.folder / LAID_OUT_DIR).glob("*"))
    assert {n: t.tolist() for n, t in read_safetensors(kept).items()} == {
        n: t.tolist() for n, t in session.placed_adapter("plain").items()
    }


def test_changed_source_is_read_again(tiny, session, source):
    """Another content is never served from the old copy; a touched file with the same content is."""
    _clean(session)
    load_file(session, "a", source, lambda: read_safetensors(source))
    os.utime(source, ns=(1, 1))
    assert load_file(session, "a", source, lambda: pytest.fail("the file was read"))
    changed = {n: np.asarray(t * 2) for n, t in tiny.adapters["one"].items()}
    save_file(changed, source)
    assert not load_file(session, "a", source, lambda: read_safetensors(source))
    session.load_adapter("changed", changed)
    np.testing.assert_array_equal(_logits(session, "a"), _logits(session, "changed"))


@pytest.mark.parametrize("damage", [lambda b: b[:40], lambda b: b[:-8], lambda b: b"x" * len(b), lambda b: b""])
def test_damaged_copy_is_made_again(session, source, damage):
    """A truncated or overwritten copy is not used."""
    _clean(session)
    load_file(session, "a", source, lambda: read_safetensors(source))
    want = _logits(session, "a")
    kept = next((session.folder / LAID_OUT_DIR).glob("*"))
    content = kept.read_bytes()
    kept.unlink()
    kept.write_bytes(damage(content))
    assert not load_file(session, "b", source, lambda: read_safetensors(source))
    np.testing.assert_array_equal(_logits(session, "b"), want)


def test_of_another_program(tiny):
    """Tensors laid out for another program are refused, and change nothing."""
    session = OrtSession(tiny.program, threads=1)
    with pytest.raises(AdapterMismatchError, match="laid out for another program"):
        session.adopt_adapter("x", {"a": np.zeros(1)})
    with pytest.raises(ConfigError, match="'base' names the base"):
        session.adopt_adapter("base", {})
    assert session.adapters == ()


@pytest.mark.parametrize("adapter", ["base", "one"])
def test_prefix_gives_the_same_logits(tiny, session, adapter):
    """A prompt behind a kept prefix gives exactly the logits that it gives when all of it is computed."""
    session.load_adapter("one", tiny.adapters["one"])
    session.set_adapter(adapter)
    session.allocate(2, 48)
    prefixes = Prefixes(1 << 20)
    prefill(session, [IDS[:16], IDS[:3]], chunk_len=16)
    prefixes.keep(session, 0, adapter, IDS[:16])
    want = prefill(session, [IDS[16:], IDS[3:9]], chunk_len=16, starts=[16, 3])[0]
    session.allocate(2, 32)
    prefill(session, [IDS[5:9], IDS[:20]], chunk_len=16)
    assert prefixes.restore(session, 1, adapter, IDS) == 16
    got = prefill(session, [IDS[9:12], IDS[16:]], chunk_len=16, starts=[4, 16])[1]
    np.testing.assert_array_equal(got, want)


def test_prefixes_are_told_apart_and_bounded(tiny):
    """Another adapter or another first token finds nothing, a token is left to compute; memory is bounded, the oldest goes."""
    session = OrtSession(tiny.program, threads=1)
    session.allocate(1, 32)
    session.run(IDS[None], np.arange(24)[None])
    one = sum(t.nbytes for t in session.read_row(0, 8).values())
    prefixes = Prefixes(2 * one)
    for start in range(3):
        prefixes.keep(session, 0, f"a{start}", IDS[:8])
    assert prefixes.bytes == 2 * one
    assert [prefixes.restore(session, 0, f"a{n}", IDS) for n in range(3)] == [0, 8, 8]
    assert prefixes.restore(session, 0, "a1", IDS[:8]) == 7
    assert prefixes.restore(session, 0, "a1", np.where(np.arange(24) == 5, IDS - 1, IDS)) == 5
    assert prefixes.restore(session, 0, "a1", IDS[1:]) == 0
    prefixes.forget("a1")
    assert prefixes.restore(session, 0, "a1", IDS) == 0
    with pytest.raises(ConfigError, match=rf"24 tokens takes {3 * one} bytes, at most {2 * one} are kept"):
        prefixes.keep(session, 0, "a2", IDS)
    session.allocate(1, 4)
    with pytest.raises(ConfigError, match="8 positions, the cache holds 4"):
        prefixes.restore(session, 0, "a2", IDS)
