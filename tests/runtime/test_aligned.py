# SPDX-License-Identifier: BSD-3-Clause
"""What kernels read begins where a line of the cache does."""

import numpy as np
import pytest

from QEfficient.contract import ADAPTER_MASK, AdapterSpec
from QEfficient.runtime import aligned
from QEfficient.runtime.adapters import place
from QEfficient.runtime.mixing import Mixture

SPECS = (
    AdapterSpec("q.A", ("rank", 5), perm=(1, 0), joined="qv.A"),
    AdapterSpec("v.A", ("rank", 5), perm=(1, 0), joined="qv.A"),
    AdapterSpec("q.B", (5, "rank"), perm=(1, 0), joined="qv.B", columns=(0, 8)),
    AdapterSpec("v.B", (3, "rank"), perm=(1, 0), joined="qv.B", columns=(5, 8)),
    AdapterSpec("o.A", (4, "rank"), held="int8"),
    AdapterSpec("o.B", ("rank", 7)),
)


@pytest.mark.parametrize("shape", [(), (0, 3), (3, 5), (1, 1000)], ids=str)
def test_zeros_and_copies(shape):
    """Any shape, of any type; a copy has the numbers, and memory of its own."""
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float16, np.uint8):
        zeros = aligned.zeros(shape, dtype)
        assert (zeros.shape, zeros.dtype, zeros.any()) == (shape, dtype, False)
        array = rng.uniform(0, 9, shape[::-1]).T
        copy = aligned.copied(array, dtype)
        np.testing.assert_array_equal(copy, array.astype(dtype))
        assert copy.flags.c_contiguous
        for made in (zeros, copy):
            assert made.size == 0 or made.ctypes.data % aligned.LINE == 0


def test_adapters_and_their_pieces():
    """Tensors of an adapter, joined, transposed, in 8 bits or as they are, and the pieces of several."""
    sizes = {"rank": 3}
    tensors = {s.name: np.ones([sizes.get(d, d) for d in s.shape], np.float32) for s in SPECS}
    placed = {**place(tensors, SPECS), ADAPTER_MASK: np.ones((1, 1, 3), np.float32)}
    mixture = Mixture(SPECS, [["qv.A", "qv.B"], ["o.A", "o.B"]])
    mixture.hold({"a": placed, "b": placed})
    for made in (placed, mixture.tensors):
        for name in ("qv.A", "qv.B", "o.A", "o.B"):
            assert made[name].ctypes.data % aligned.LINE == 0


def test_what_nobody_can_write_is_used_where_it_is():
    """A mapped tensor that fits is not copied; one that may be written is."""
    spec = AdapterSpec("o.B", ("rank", 7))
    given = np.ones((3, 7), np.float32)
    assert place({"o.B": given}, [spec])["o.B"] is not given
    given.flags.writeable = False
    assert place({"o.B": given}, [spec])["o.B"] is given
