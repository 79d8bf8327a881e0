# SPDX-License-Identifier: BSD-3-Clause
"""Weight-only quantisation: projections and embeddings of the base as blocks of 8- or 4-bit numbers.

Adapter tensors are inputs and stay as they are. The numbers are computed when the program's weights are written, one weight
after the other, and each weight's own error is noted then.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from QEfficient.compile.blocks import BITS, Blocks, count_blocks, dequantize, quantize
from QEfficient.compile.matrices import MatrixUse, matrix_uses, replace_product, with_bias
from QEfficient.compile.values import CONTRIB, new_computed, new_constant, replace_node, trimmed
from QEfficient.compile.weightfile import read_weight
from QEfficient.errors import ConfigError

Array = npt.NDArray[Any]

ROUTERS = ("*router*", "*.mlp.gate.weight")
"""Weights that choose experts stay float32: a small error there sends a token elsewhere, and they are tiny."""

ACCURACY_LEVEL = 4
"""The kernel's name for: activations as 8-bit blocks too, products of integers."""

_RECENT = 3  # queries, keys and values may be stored together
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True)
class Precision:
    """How a program holds the base's weights.

    Attributes:
        name: ``"fp32"``, ``"bf16"``, ``"int8"`` or ``"int4"``.
        block_size: Weights that share a scale.
        symmetric: Blocks have a scale only; otherwise a zero point too.
        keep: Patterns of weight names that stay one step higher: 8 bits in an int4 program, float32 in an int8 one.
    """

    name: str = "fp32"
    block_size: int = 32
    symmetric: bool = True
    keep: tuple[str, ...] = ()

    def bits(self, weight: str) -> int:
        """Return the bits of the weight of that name; 0: it stays as it is."""
        if self.name not in BITS or is_router(weight):
            return 0
        kept = any(fnmatch(weight, pattern) for pattern in self.keep)
        return BITS[self.name] if not kept else {"int4": 8, "int8": 0}[self.name]


def is_router(weight: str) -> bool:
    """Whether the weight of that name chooses experts."""
    return any(fnmatch(weight, pattern) for pattern in ROUTERS)


class QuantizeWeights:
    """``MatMul(x, Transpose(w))``, ``MatMul(x, w)`` and ``Gemm`` become ``MatMulNBits``, ``Gather(w, ids)`` ``GatherBlockQuantized``.

    1. ``w`` is a float initializer of two dimensions, perhaps cast to float32.
    2. A bias that is added to the product, and to nothing else, goes into the kernel.
    3. An embedding whose rows do not end with a block stays as it is.

    A weight used in several ways (a tied embedding) is quantised and stored once.

    Attributes:
        errors: ``{weight: {"bits": n, "error": |w' - w| / |w|}}`` of the weights that have been written so far.
    """

    def __init__(self, precision: Precision) -> None:
        self.precision = precision
        self.errors: dict[str, dict[str, float]] = {}
        self._recent: dict[str, Blocks] = {}

    def apply(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Replace every match in ``model``; return it, and whether there was one.

        Raises:
            ConfigError: A pattern of weights to keep matches none.
        """
        self._check_patterns(model)
        made: dict[tuple[str, bool], _Quantized] = {}
        changed = False
        for match in matrix_uses(model.graph):
            bits = self.precision.bits(str(match.weight.name))
            if not bits:
                continue
            if match.is_embedding and match.columns % self.precision.block_size:
                continue
            key = (str(match.weight.name), match.by_column)
            if key not in made:
                made[key] = self._quantized(model.graph, match, bits)
            (_gather if match.is_embedding else _multiply)(model.graph, match, made[key], self.precision)
            changed = True
        if changed:
            model.opset_imports.setdefault(CONTRIB, 1)
            common.RemoveUnusedNodesPass()(model)
        return model, changed

    def _check_patterns(self, model: ir.Model) -> None:
        names = {str(match.weight.name) for match in matrix_uses(model.graph)}
        for pattern in self.precision.keep:
            if not any(fnmatch(name, pattern) for name in names):
                some = ", ".join(sorted(names)[:3])
                raise ConfigError(f"keep {pattern!r} matches no weight (there are {len(names)}: {some}, …)")

    def _quantized(self, graph: ir.Graph, match: MatrixUse, bits: int) -> "_Quantized":
        """Return initializers that compute themselves when they are written."""
        weight = _Weight(str(match.weight.name), match.weight.const_value, match.by_column, bits)
        count = count_blocks(match.columns, self.precision.block_size)
        size = self.precision.block_size * bits // 8

        def part(suffix: str, dtype: ir.DataType, shape: Sequence[int], get: Callable[[Blocks], Any]) -> ir.Value:
            name = f"{weight.name}_{'columns_' * weight.by_column}{suffix}"
            return new_computed(graph, name, dtype, shape, lambda: get(self._blocks(weight)))

        uint8, float32, rows = ir.DataType.UINT8, ir.DataType.FLOAT, match.rows
        zeros = None
        data = part(f"int{bits}", uint8, (rows, count, size), lambda b: b.data)
        scales = part("scales", float32, (rows, count), lambda b: b.scales)
        if not self.precision.symmetric:
            zeros = part("zeros", uint8, (rows, -(-count * bits // 8)), lambda b: b.zeros)
        return _Quantized(data, scales, zeros, bits)

    def _blocks(self, weight: "_Weight") -> Blocks:
        """Quantise a weight, rows by rows; a few are kept, because their parts are asked for one by one."""
        key = f"{weight.name} {weight.by_column}"
        if key not in self._recent:
            while len(self._recent) >= _RECENT:
                del self._recent[next(iter(self._recent))]
            blocks, error = weight.quantize(self.precision)
            self.errors[weight.name] = {"bits": weight.bits, "error": error}
            self._recent[key] = blocks
        return self._recent[key]


@dataclass(eq=False, slots=True)
class _Weight:
    """A weight on its way to blocks."""

    name: str
    tensor: Any
    by_column: bool
    bits: int

    def quantize(self, precision: Precision) -> tuple[Blocks, float]:
        """Return the blocks and the relative error; float32 copies of some rows only are in memory."""
        whole = read_weight(self.tensor)
        rows = whole.T if self.by_column else whole
        step = max(1, _CHUNK_ELEMENTS // rows.shape[1])
        parts, wrong, size = [], 0.0, 0.0
        for start in range(0, rows.shape[0], step):
            chunk = np.asarray(rows[start : start + step], np.float32)
            part = quantize(chunk, bits=self.bits, block_size=precision.block_size, symmetric=precision.symmetric)
            wrong += float(np.square(dequantize(part, rows.shape[1]) - chunk).sum(dtype=np.float64))
            size += float(np.square(chunk).sum(dtype=np.float64))
            parts.append(part)
        zeros = [p.zeros for p in parts if p.zeros is not None]
        blocks = Blocks(
            np.concatenate([p.data for p in parts]),
            np.concatenate([p.scales for p in parts]),
            np.concatenate(zeros) if zeros else None,
            self.bits,
        )
        return blocks, (wrong / size) ** 0.5 if size else 0.0


@dataclass(frozen=True, slots=True)
class _Quantized:
    data: ir.Value
    scales: ir.Value
    zeros: ir.Value | None
    bits: int


def _multiply(graph: ir.Graph, match: MatrixUse, weight: _Quantized, precision: Precision) -> None:
    bias, last = with_bias(graph, match)
    inputs = trimmed([match.x, weight.data, weight.scales, weight.zeros, None, bias])
    fused = ir.node(
        "MatMulNBits",
        inputs,
        {
            "K": match.columns,
            "N": match.rows,
            "bits": weight.bits,
            "block_size": precision.block_size,
            "accuracy_level": ACCURACY_LEVEL,
        },
        domain=CONTRIB,
    )
    replace_product(graph, match, last, fused)


def _gather(graph: ir.Graph, match: MatrixUse, weight: _Quantized, precision: Precision) -> None:
    name = f"{weight.data.name}_rows"
    shape = new_constant(graph, f"{name}_shape", np.array([match.rows, match.columns * weight.bits // 8], np.int64))
    rows = ir.node("Reshape", [weight.data, shape])
    fused = ir.node(
        "GatherBlockQuantized",
        [rows.outputs[0], match.x, weight.scales, *([weight.zeros] if weight.zeros is not None else [])],
        {"bits": weight.bits, "block_size": precision.block_size, "gather_axis": 0, "quantize_axis": 1},
        domain=CONTRIB,
    )
    rows.outputs[0].name = name
    graph.insert_before(match.node, rows)
    replace_node(graph, match.node, fused)
