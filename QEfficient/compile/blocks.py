# SPDX-License-Identifier: BSD-3-Clause
"""Blocks of weights as small integers: ``w = (q - zero) * scale``, one scale for each block of a row.

The layout is that of ONNX Runtime's ``MatMulNBits`` and ``GatherBlockQuantized``: rows of the weight one after the other, blocks
along a row, two 4-bit numbers to a byte, the first one in the low bits. Knows arrays only.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

BITS = {"int8": 8, "int4": 4}
BLOCK_SIZES = (16, 32, 64, 128, 256)

# A block's largest weight need not be met exactly: shorter scales lose a little there and win everywhere else.
_SHRINK = {4: (1.05, 1.0, 0.95, 0.9, 0.85, 0.8), 8: (1.0,)}


@dataclass(frozen=True, slots=True)
class Blocks:
    """A quantised weight ``(N, K)`` of ``nb`` blocks in a row.

    Attributes:
        data: uint8, ``(N, nb, block_size * bits / 8)``.
        scales: float32, ``(N, nb)``.
        zeros: uint8, ``(N, nb * bits / 8)`` rounded up; ``None`` if symmetric: zero is the middle of the range.
        bits: 4 or 8.
    """

    data: Array
    scales: Array
    zeros: Array | None
    bits: int


def count_blocks(columns: int, block_size: int) -> int:
    """Return how many blocks make a row; the last one may be filled up with zeros."""
    return -(-columns // block_size)


def quantize(weight: Array, *, bits: int, block_size: int, symmetric: bool) -> Blocks:
    """Return ``weight`` ``(N, K)`` in blocks.

    Symmetric blocks span from the weight of largest magnitude, which becomes the lowest number, to as far on the other side.
    Others span from their smallest to their largest weight, zero included. At 4 bits, each block takes those numbers, of
    a few slightly different spans, that leave the least squared error with the scale that fits them best.
    """
    rows, columns = weight.shape
    count = count_blocks(columns, block_size)
    padded = np.zeros((rows, count * block_size), np.float32)
    padded[:, :columns] = weight
    blocks = padded.reshape(rows, count, block_size)
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    if symmetric:
        low, high = blocks.min(2), blocks.max(2)
        scales = np.where(-low > high, low, high) / -middle
        zeros = np.full(scales.shape, middle, np.float32)
    else:
        low, high = np.minimum(blocks.min(2), 0), np.maximum(blocks.max(2), 0)
        scales = (high - low) / top
        zeros = np.rint(np.divide(-low, scales, out=np.zeros_like(low), where=scales != 0))
    best, least, numbers = scales, np.full(scales.shape, np.inf, np.float32), np.zeros(blocks.shape, np.uint8)
    for shrink in _SHRINK[bits]:
        tried = scales * np.float32(shrink)
        q = np.rint(blocks * _inverse(tried)[..., None]) + zeros[..., None]
        np.clip(q, 0, top, out=q)
        centred = q - zeros[..., None]
        # For these numbers, the scale of least squares: it takes away what clipping and rounding lean to.
        products, squares = np.einsum("nbk,nbk->nb", blocks, centred), np.einsum("nbk,nbk->nb", centred, centred)
        fitted = np.where(squares > 0, products * _inverse(squares), tried)
        error = -products * fitted  # |w|² is the same for all
        better = error < least
        best, least = np.where(better, fitted, best), np.where(better, error, least)
        np.copyto(numbers, q.astype(np.uint8), where=better[..., None])
    packed = None if symmetric else _pack(zeros.astype(np.uint8), bits)
    return Blocks(_pack(numbers, bits), best.astype(np.float32), packed, bits)


def dequantize(blocks: Blocks, columns: int) -> Array:
    """Return the weight that ``blocks`` stand for, ``(N, columns)``."""
    rows, count = blocks.scales.shape
    numbers = unpack(blocks.data, blocks.bits).astype(np.float32)
    zeros: Any = 2 ** (blocks.bits - 1)
    if blocks.zeros is not None:
        zeros = unpack(blocks.zeros, blocks.bits)[:, :count, None].astype(np.float32)
    weight: Array = ((numbers - zeros) * blocks.scales[..., None]).reshape(rows, -1)[:, :columns]
    return weight


def _inverse(array: Array) -> Array:
    """Return ``1 / array``, and 0 for 0."""
    inverse: Array = np.divide(1, array, out=np.zeros_like(array), where=array != 0)
    return inverse


def _pack(numbers: Array, bits: int) -> Array:
    """Put pairs along the last axis into bytes; an odd last one stands alone."""
    if bits == 8:
        return numbers
    if numbers.shape[-1] % 2:
        numbers = np.concatenate([numbers, np.zeros_like(numbers[..., :1])], axis=-1)
    packed: Array = numbers[..., 0::2] | (numbers[..., 1::2] << 4)
    return packed


def unpack(data: Array, bits: int) -> Array:
    """Return the numbers that bytes hold, along their last axis."""
    if bits == 8:
        return data
    pairs: Array = np.stack([data & 15, data >> 4], axis=-1)
    return pairs.reshape(*data.shape[:-1], -1)
