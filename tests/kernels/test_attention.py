# SPDX-License-Identifier: BSD-3-Clause
import numpy as np
import pytest

from QEfficient.kernels.check import ATTENTIONS, TOLERANCE, Heads, run_in_place, session


@pytest.mark.parametrize(("heads", "lengths", "tokens"), ATTENTIONS)
def test_sums_and_caches(library, heads, lengths, tokens):
    """Rows of any length, packed or not, in a window or not: sums are right, the token is in the cache, nothing else has changed."""
    feeds = heads.draw(np.random.default_rng(0), lengths, places=1200, tokens=tokens)
    got = run_in_place(session(heads.model(), library, threads=2), feeds)
    for array, wanted in zip(got, heads.attend(feeds), strict=True):
        np.testing.assert_allclose(array, wanted, rtol=0, atol=TOLERANCE)
    for kind, after in zip(("past_key", "past_value"), got[1:], strict=True):
        changed = (after != feeds[kind]).any((1, 3))
        assert changed.sum(1).tolist() == [tokens] * len(lengths)
        assert all(changed[row, n : n + tokens].all() for row, n in enumerate(lengths))


def test_caches_that_are_not_written_in_place(library):
    """Without caches to write to, the operator makes new ones, as far as they are filled."""
    heads, lengths = Heads(4, 2, 16), (7, 20)
    feeds = heads.draw(np.random.default_rng(0), lengths, places=32)
    got, wanted = session(heads.model(), library).run(None, feeds), heads.attend(feeds)
    np.testing.assert_allclose(got[0], wanted[0], rtol=0, atol=TOLERANCE)
    for row, filled in enumerate(lengths):
        for made, of in zip(got[1:], wanted[1:], strict=True):
            np.testing.assert_allclose(made[row, :, : filled + 1], of[row, :, : filled + 1], rtol=0, atol=TOLERANCE)


def test_what_is_no_number(library):
    """A row whose cache holds what is not finite gives that, and no other row does."""
    heads = Heads(4, 2, 16)
    feeds = heads.draw(np.random.default_rng(0), (7, 20, 9), places=32)
    feeds["past_key"][1, :, 3] = np.nan
    feeds["past_value"][2, :, 4] = np.nan
    got = run_in_place(session(heads.model(), library), feeds)[0]
    assert [bool(np.isfinite(row).all()) for row in got] == [True, False, False]
    assert np.isnan(got[1]).all()


@pytest.mark.parametrize("last", [-1, 32])
def test_lengths_outside_the_cache_are_refused(library, last):
    """A length that does not fit is an error, not memory of somebody else."""
    heads = Heads(4, 2, 16)
    feeds = heads.draw(np.random.default_rng(0), (7, 20), places=32)
    feeds["seqlens_k"][1] = last
    with pytest.raises(Exception, match="does not fit the cache"):
        run_in_place(session(heads.model(), library), feeds)
