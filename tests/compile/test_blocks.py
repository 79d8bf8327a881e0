# SPDX-License-Identifier: BSD-3-Clause
import numpy as np
import pytest

from QEfficient.compile.blocks import count_blocks, dequantize, quantize


def _weight(rows=12, columns=80, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_no_weight_moves_further_than_a_step(bits, block_size, symmetric):
    """Each weight comes back within half a step of its block, a whole one where the scale was shortened or the range ends."""
    weight = _weight()
    blocks = quantize(weight, bits=bits, block_size=block_size, symmetric=symmetric)
    count = count_blocks(80, block_size)
    assert blocks.data.shape == (12, count, block_size * bits // 8)
    assert blocks.scales.shape == (12, count)
    assert (blocks.zeros is None) == symmetric
    step = np.repeat(np.abs(blocks.scales), block_size, axis=1)[:, :80]
    # Shortened by up to 15 %, a block of 16 numbers ends up to 1.2 steps before its largest weight.
    assert (np.abs(dequantize(blocks, 80) - weight) <= step * (2 if bits == 4 else 1.01)).all()


def test_smaller_blocks_and_more_bits_err_less():
    """The error shrinks with the block, with zero points, and by about 16 with four more bits."""
    weight = _weight(64, 512)

    def error(**how):
        return np.linalg.norm(dequantize(quantize(weight, **how), 512) - weight) / np.linalg.norm(weight)

    coarse = error(bits=4, block_size=128, symmetric=True)
    fine = error(bits=4, block_size=32, symmetric=True)
    assert 0.07 < error(bits=4, block_size=32, symmetric=False) < fine < coarse < 0.11
    assert 0.003 < error(bits=8, block_size=32, symmetric=True) < 0.007


def test_exact_weights_come_back():
    """Weights that lie on a grid of 16 numbers, zeros and constant blocks included, come back as they were."""
    weight = np.random.default_rng(1).integers(-8, 8, (6, 64)).astype(np.float32) / 4
    weight[:, ::32] = -2
    weight[0] = 0
    made = dequantize(quantize(weight, bits=4, block_size=32, symmetric=True), 64)
    np.testing.assert_allclose(made, weight, rtol=0, atol=1e-6)  # the fitted scale is rounded
    one_sided = np.abs(weight)
    for symmetric in (True, False):
        made = dequantize(quantize(one_sided, bits=8, block_size=32, symmetric=symmetric), 64)
        np.testing.assert_allclose(made, one_sided, atol=0.01)
