# SPDX-License-Identifier: BSD-3-Clause
"""Whether a library's operators are right on this machine: ``python -m QEfficient.kernels.check LIBRARY``, exit code 1 if not.

The same integers and roundings in NumPy are the reference, so what differs is the order of float32 additions only.
"""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from QEfficient.kernels.library import DOMAIN

Array = npt.NDArray[Any]

TOLERANCE = 2e-5
"""Of the largest value. Sums of a few hundred float32 numbers in another order; seen 1e-6. A wrong integer is 1e-3 and more."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """A random weight ``(N, K)`` in blocks.

    Attributes:
        data: ``(N, blocks, block_size * bits / 8)``; at 4 bits the even column is in the low half of a byte.
        scales: ``(N, blocks)``.
        zeros: ``(N, blocks * bits / 8 rounded up)``, or ``None``: the middle of the range.
    """

    data: Array
    scales: Array
    zeros: Array | None
    columns: int
    block_size: int
    bits: int

    @classmethod
    def random(
        cls, rng: np.random.Generator, rows: int, columns: int, *, bits: int, block_size: int, zeros: bool
    ) -> "Blocks":
        """Draw a weight; what fills the last block is drawn too, and must not count."""
        blocks = -(-columns // block_size)
        return cls(
            rng.integers(0, 256, (rows, blocks, block_size * bits // 8), np.uint8),
            rng.uniform(0.5, 1.5, (rows, blocks)).astype(np.float32),
            rng.integers(0, 256, (rows, -(-blocks * bits // 8)), np.uint8) if zeros else None,
            columns,
            block_size,
            bits,
        )

    def dequantized(self) -> Array:
        """Return the weight, float64."""
        data = _unpacked(self.data, self.bits).astype(np.float64)
        zeros: Array | float = 2.0 ** (self.bits - 1)
        if self.zeros is not None:
            zeros = _unpacked(self.zeros, self.bits)[:, : data.shape[1], None].astype(np.float64)
        return ((data - zeros) * self.scales[..., None]).reshape(len(data), -1)[:, : self.columns]


def _unpacked(packed: Array, bits: int) -> Array:
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


def product(x: Array, weight: Blocks, bias: Array | None = None) -> Array:
    """Return ``x @ weight.T + bias``, float64, with each row of ``x`` ``(M, K)`` rounded to 8 bits in blocks, as the operator does.

    The blocks of ``x`` are the weight's, in halves where these take more than 128 bytes.
    """
    size = min(weight.block_size, 128 * 8 // weight.bits)
    blocks = -(-weight.columns // size)
    filled = np.zeros((len(x), blocks * size), np.float32)
    filled[:, : weight.columns] = x
    parts = filled.reshape(len(x), blocks, size)
    top = np.abs(parts).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), top, where=top > 0, out=np.zeros_like(top))
    scale = np.divide(np.float32(1), inverse, where=inverse > 0, out=np.zeros_like(top))
    rounded = (np.rint(parts * inverse) * scale.astype(np.float64)).reshape(len(x), -1)[:, : weight.columns]
    made: Array = rounded @ weight.dequantized().T + (0 if bias is None else bias)
    return made


def session(made: Any, library: Path, threads: int = 1) -> onnxruntime.InferenceSession:
    """Return a session of a model that uses the operators."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])


def model(weight: Blocks, bias: Array | None = None, *, adapters: bool = False) -> Any:
    """Return a model of one ``BlockProduct``: ``x`` ``(M, K)``, and ``a``, ``b`` and ``places`` if there are adapters, to ``y``."""
    parts = {"data": weight.data, "scales": weight.scales, "zeros": weight.zeros, "bias": bias}
    names = ["x", *(name if array is not None else "" for name, array in parts.items())]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", weight.columns])]
    if adapters:
        names += ["a", "b", "places"]
        inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT16, None) for name in "ab"]
        inputs += [helper.make_tensor_value_info("places", TensorProto.FLOAT, [None, None, None])]
    sizes: dict[str, Any] = {
        "N": len(weight.data),
        "K": weight.columns,
        "bits": weight.bits,
        "block_size": weight.block_size,
    }
    graph = helper.make_graph(
        [helper.make_node("BlockProduct", names, ["y"], domain=DOMAIN, **sizes)],
        "graph",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in parts.items() if array is not None],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def wrong_products(library: Path) -> list[str]:
    """Return a line for each kind of blocks that the library multiplies wrongly."""
    found = []
    rng, columns = np.random.default_rng(0), 2984  # eight rows of as many do not fit into the nearest cache
    for bits, block_size, zeros in itertools.product((4, 8), (32, 64, 128, 256), (False, True)):
        weight = Blocks.random(rng, 37, columns, bits=bits, block_size=block_size, zeros=zeros)
        x, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((13, columns), 37))
        run = session(model(weight, bias), library, threads=2)
        got, wanted = run.run(None, {"x": x})[0], product(x, weight, bias)
        alone = np.concatenate([run.run(None, {"x": x[i : i + 1]})[0] for i in range(len(x))])
        kind = f"int{bits} in blocks of {block_size}{' with zero points' if zeros else ''}"
        off = float(np.abs(got - wanted).max() / np.abs(wanted).max())
        if not off < TOLERANCE:
            found.append(f"{kind}: off by {off:.1e} of the largest value")
        elif not np.array_equal(got, alone):
            found.append(f"{kind}: a row depends on the rows beside it")
    return found


def wrong_updates(library: Path) -> list[str]:
    """Return a line for each way in which the library adds adapters wrongly: one for all rows, and different ones for each."""
    found = []
    rng = np.random.default_rng(1)
    weight = Blocks.random(rng, 37, 1240, bits=4, block_size=128, zeros=False)
    run = session(model(weight, adapters=True), library, threads=2)
    for ranks in ((5, 0, 37), (16, 16, 16), (64, 3, 0)):
        adapters = [
            tuple(rng.standard_normal(shape).astype(np.float16) for shape in ((1240, r), (r, 37))) for r in ranks
        ]
        chosen = rng.integers(0, len(ranks), 11)
        x = rng.standard_normal((11, 1240)).astype(np.float32)
        wanted = product(x, weight)
        for row, of in enumerate(chosen):
            a, b = (t.astype(np.float64) for t in adapters[of])
            wanted[row] += x[row] @ a @ b
        got = run.run(None, {"x": x, **pieces(adapters, chosen)})[0]
        off = float(np.abs(got - wanted).max() / np.abs(wanted).max())
        if not off < TOLERANCE:
            found.append(f"adapters of ranks {ranks} in one call: off by {off:.1e} of the largest value")
        ones = np.ones((1, 1, 1), np.float32)
        for of, (a, b) in enumerate(adapters):
            rows = np.flatnonzero(chosen == of)
            if a.shape[1] and len(rows):
                alone = run.run(None, {"x": x[rows], "a": a, "b": b, "places": ones})[0]
                if not np.array_equal(alone, got[rows]):
                    found.append(
                        f"an adapter of rank {a.shape[1]}: rows differ from what they are without other adapters"
                    )
    return found


def pieces(adapters: Sequence[tuple[Array, ...]], chosen: Array, ranks: int = 16) -> dict[str, Array]:
    """Return the inputs for rows with these adapters ``(A, B)``: cut into pieces, the last of each filled up with zeros."""
    cut_a, cut_b, columns = [], [], []
    for of, (a, b) in enumerate(adapters):
        for first in range(0, a.shape[1], ranks):
            count = min(ranks, a.shape[1] - first)
            cut_a.append(np.pad(a[:, first : first + ranks], ((0, 0), (0, ranks - count)))[None])
            cut_b.append(np.pad(b[first : first + ranks], ((0, ranks - count), (0, 0)))[None])
            columns.append(chosen == of)
    return {"a": np.stack(cut_a), "b": np.stack(cut_b), "places": np.stack(columns, -1)[:, None].astype(np.float32)}


if __name__ == "__main__":
    wrong = [*wrong_products(Path(sys.argv[1])), *wrong_updates(Path(sys.argv[1]))]
    print("; ".join(wrong))  # noqa: T201 - this is a command
    sys.exit(bool(wrong))
