# SPDX-License-Identifier: BSD-3-Clause
import numpy as np
import pytest

from QEfficient.kernels.ranks import TAIL, from_bytes, in_bytes


@pytest.mark.parametrize("axis", [0, 1])
def test_numbers_and_scales(axis):
    """A number is off by half a step at most, a step is 1/127 of the largest of its rank; normal ones by 0.8 %."""
    rng = np.random.default_rng(0)
    matrix = np.moveaxis(rng.standard_normal((6, 900)) * 10.0 ** np.arange(-30, 30, 10)[:, None], 0, axis)
    matrix = matrix.astype(np.float32)
    held = in_bytes(matrix, axis)
    assert (held.dtype, held.shape[axis], held.shape[1 - axis]) == (np.int8, 6, 900 + TAIL)
    steps = np.abs(matrix).max(1 - axis, keepdims=True) / 127
    error = from_bytes(held, axis) - matrix
    assert (np.abs(error) <= steps * 0.5001).all()
    assert np.linalg.norm(error / steps) / np.linalg.norm(matrix / steps) < 0.01
    np.testing.assert_array_equal(in_bytes(from_bytes(held, axis), axis), held)


def test_zeros():
    """Ranks of zeros are all zeros, their scales too: what fills up a piece is one."""
    assert not in_bytes(np.zeros((3, 5)), 0).any()


@pytest.mark.parametrize("wrong", [np.inf, np.nan])
def test_what_is_not_finite_stays_so(wrong):
    """One such number, and its rank has none that is finite; the others are as they were."""
    matrix = np.ones((2, 5), np.float32)
    matrix[1, 3] = wrong
    made = from_bytes(in_bytes(matrix, 0), 0)
    np.testing.assert_array_equal(made[0], 1)
    assert not np.isfinite(made[1]).any()
