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

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from QEfficient.kernels.library import DOMAIN
from QEfficient.kernels.ranks import from_bytes, in_bytes
from QEfficient.kernels.strips import data_in_strips, in_strips

Array = npt.NDArray[Any]

TOLERANCE = 2e-5
"""Of the largest value. Sums of a few hundred float32 numbers in another order; seen 1e-6. A wrong integer is 1e-3 and more."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """A random weight ``(N, K)`` in blocks.

    Attributes:
        data: ``(N, blocks, block_size * bits / 8)``; at 4 bits the even column is in the low half of a byte.
        scales: ``(N, blocks)``.
        zeros: ``(N, blocks)``, or ``None``: the middle of the range.
    """

    data: Array
    scales: Array
    zeros: Array | None
    columns: int
    block_size: int
    bits: int

    operator = "BlockProduct"
    adapters = np.int8

    def adapter(self, rng: np.random.Generator, rank: int) -> tuple[Array, ...]:
        """Draw ``A`` ``(K, r)`` and ``B`` ``(r, N)`` that 8 bits can hold."""
        matrices = (rng.standard_normal(shape) for shape in ((self.columns, rank), (rank, len(self.data))))
        return tuple(from_bytes(in_bytes(m, axis), axis) for m, axis in zip(matrices, (1, 0), strict=True))

    def held(self, a: Array, b: Array) -> tuple[Array, ...]:
        """Return ``A`` and ``B`` as the operator takes them."""
        return in_bytes(a, 1), in_bytes(b, 0)

    def parts(self) -> dict[str, Array | None]:
        """Return the operator's inputs that make the weight."""
        zeros = in_strips(self.zeros) if self.zeros is not None else None
        return {"data": data_in_strips(self.data), "scales": in_strips(self.scales), "zeros": zeros}

    def sizes(self) -> dict[str, Any]:
        """Return the operator's attributes."""
        return {"N": len(self.data), "K": self.columns, "bits": self.bits, "block_size": self.block_size}

    @classmethod
    def random(
        cls, rng: np.random.Generator, rows: int, columns: int, *, bits: int, block_size: int, zeros: bool
    ) -> "Blocks":
        """Draw a weight; what fills the last block is drawn too, and must not count."""
        blocks = -(-columns // block_size)
        return cls(
            rng.integers(0, 256, (rows, blocks, block_size * bits // 8), np.uint8),
            rng.uniform(0.5, 1.5, (rows, blocks)).astype(np.float32),
            rng.integers(0, 2**bits, (rows, blocks), np.uint8) if zeros else None,
            columns,
            block_size,
            bits,
        )

    def dequantized(self) -> Array:
        """Return the weight, float64."""
        data = _unpacked(self.data, self.bits).astype(np.float64)
        zeros: Array | float = 2.0 ** (self.bits - 1)
        if self.zeros is not None:
            zeros = self.zeros[..., None].astype(np.float64)
        return ((data - zeros) * self.scales[..., None]).reshape(len(data), -1)[:, : self.columns]


def _unpacked(packed: Array, bits: int) -> Array:
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


@dataclass(frozen=True, slots=True)
class Floats:
    """A weight ``(N, K)`` in 16-bit floats, bfloat16 or float16."""

    data: Array

    adapters = np.float32

    def adapter(self, rng: np.random.Generator, rank: int) -> tuple[Array, ...]:
        """Draw ``A`` ``(K, r)`` and ``B`` ``(r, N)``."""
        return tuple(
            rng.standard_normal(shape).astype(np.float32) for shape in ((self.columns, rank), (rank, len(self.data)))
        )

    def held(self, a: Array, b: Array) -> tuple[Array, ...]:
        """Return ``A`` and ``B`` as the operator takes them."""
        return a.astype(np.float32), b.astype(np.float32)

    @property
    def operator(self) -> str:
        """The operator that multiplies by it."""
        return "Float16Product" if self.data.dtype == np.float16 else "Bfloat16Product"

    @property
    def columns(self) -> int:
        """``K``."""
        return int(self.data.shape[1])

    def parts(self) -> dict[str, Array | None]:
        """Return the operator's inputs that make the weight."""
        return {"data": self.data}

    def sizes(self) -> dict[str, Any]:
        """Return the operator's attributes."""
        return {"N": len(self.data), "K": self.columns}


def product(x: Array, weight: Blocks | Floats, bias: Array | None = None) -> Array:
    """Return ``x @ weight.T + bias``, float64.

    With blocks, each row of ``x`` ``(M, K)`` is rounded to 8 bits in the weight's blocks, as the operator does.
    """
    if isinstance(weight, Floats):
        return x.astype(np.float64) @ weight.data.astype(np.float64).T + (0 if bias is None else bias)
    size = weight.block_size
    blocks = len(weight.scales[0])
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


def model(
    weight: "Blocks | Floats", bias: Array | None = None, *, adapters: bool = False, starts: Sequence[int] = ()
) -> Any:
    """Return a model of one product: ``x`` ``(M, K)``, and ``a``, ``b`` and ``places`` if there are adapters, to ``y``.

    Where there are ``starts``, each part of an adapter's ranks adds to the columns from its start to the next one's.
    """
    parts = {**weight.parts(), "bias": bias}
    sizes = {**weight.sizes(), **({"starts": [*starts]} if starts else {})}
    names = ["x", *(name if array is not None else "" for name, array in parts.items())]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", weight.columns])]
    if adapters:
        names += ["a", "b", "places"]
        held = helper.np_dtype_to_tensor_dtype(np.dtype(weight.adapters))
        inputs += [helper.make_tensor_value_info(name, held, None) for name in "ab"]
        inputs += [helper.make_tensor_value_info("places", TensorProto.FLOAT, [None, None, None])]
    graph = helper.make_graph(
        [helper.make_node(weight.operator, names, ["y"], domain=DOMAIN, **sizes)],
        "graph",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in parts.items() if array is not None],
    )
    return _model_of(graph)


def rows(weight: Blocks) -> Any:
    """Return a model of one ``BlockRows``: ``ids`` to ``y``."""
    parts = {name: array for name, array in weight.parts().items() if array is not None}
    graph = helper.make_graph(
        [helper.make_node("BlockRows", ["ids", *parts], ["y"], domain=DOMAIN, **weight.sizes())],
        "graph",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in parts.items()],
    )
    return _model_of(graph)


def _model_of(graph: Any) -> Any:
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


def wrong_rows(library: Path) -> list[str]:
    """Return a line for each kind of blocks that the library takes rows out of wrongly."""
    found = []
    rng = np.random.default_rng(6)
    for bits, zeros in itertools.product((4, 8), (False, True)):
        weight = Blocks.random(rng, 37, 200, bits=bits, block_size=32, zeros=zeros)
        ids = rng.integers(0, 37, (2, 9))
        got = session(rows(weight), library, threads=2).run(None, {"ids": ids})[0]
        if not np.array_equal(got, weight.dequantized().astype(np.float32)[ids]):
            found.append(f"rows of int{bits}{' with zero points' if zeros else ''} are others")
    return found


def wrong_floats(library: Path) -> list[str]:
    """Return a line for each kind of floats that the library multiplies wrongly, for few rows and for many."""
    found = []
    rng, columns = np.random.default_rng(3), 941  # more than a panel is deep, and no multiple of what is loaded at once
    for held in (ml_dtypes.bfloat16, np.float16):
        weight = Floats(rng.standard_normal((37, columns)).astype(held))
        x, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((29, columns), 37))
        run = session(model(weight, bias), library, threads=2)
        for count in (1, 2, 3, 7, 16, 29):
            got, wanted = run.run(None, {"x": x[:count]})[0], product(x[:count], weight, bias)
            off = float(np.abs(got - wanted).max() / np.abs(wanted).max())
            if not off < TOLERANCE:
                found.append(f"{weight.data.dtype}, {count} rows: off by {off:.1e} of the largest value")
    return found


def wrong_updates(library: Path) -> list[str]:
    """Return a line for each way in which the library adds adapters wrongly: one for all rows, and different ones for each."""
    found = []
    rng = np.random.default_rng(1)
    blocks = Blocks.random(rng, 37, 1243, bits=4, block_size=128, zeros=False)
    floats = Floats(rng.standard_normal((37, 1243)).astype(ml_dtypes.bfloat16))
    weights: tuple[Blocks | Floats, ...] = (blocks, floats)
    cases = (((5, 0, 37), ()), ((16, 16, 16), ()), ((64, 3, 0), ()), ((20, 32, 4), (0, 19)), ((48, 0, 60), (7, 9, 30)))
    for weight, (ranks, starts) in itertools.product(weights, cases):
        run = session(model(weight, adapters=True, starts=starts), library, threads=2)
        adapters = [weight.adapter(rng, r) for r in ranks]
        chosen = rng.integers(0, len(ranks), 11)
        x = rng.standard_normal((11, 1243)).astype(np.float32)
        wanted = product(x, weight)
        for row, of in enumerate(chosen):
            a, b = (t.astype(np.float64) for t in adapters[of])
            wanted[row] += x[row] @ a @ (b * counted(len(b), 37, starts))
        got = run.run(None, {"x": x, **pieces(weight, adapters, chosen, starts=starts)})[0]
        off = float(np.abs(got - wanted).max() / np.abs(wanted).max())
        if not off < TOLERANCE:
            kind = f"{weight.operator}, adapters of ranks {ranks} in one call{f', from {starts} on' if starts else ''}"
            found.append(f"{kind}: off by {off:.1e} of the largest value")
        ones = np.ones((1, 1, 1), np.float32)
        for of, (a, b) in enumerate(
            adapters if weight is blocks else ()
        ):  # products of floats depend on how many rows there are
            if not a.shape[1]:
                continue
            held = weight.held(a, b)
            for at in np.flatnonzero(chosen == of):
                alone = run.run(None, {"x": x[at : at + 1], "a": held[0], "b": held[1], "places": ones})[0]
                if not np.array_equal(alone[0], got[at]):
                    found.append(f"an adapter of rank {a.shape[1]}: a row depends on the rows and adapters beside it")
    return found


def wrong_ranks(library: Path) -> list[str]:
    """Return a line for each adapter that the library adds wrongly: of few ranks, of one, and the bare base, zeros, right after them."""
    found = []
    rng = np.random.default_rng(5)
    blocks = Blocks.random(rng, 37, 200, bits=4, block_size=32, zeros=False)
    floats = Floats(rng.standard_normal((37, 200)).astype(np.float16))
    x = rng.standard_normal((3, 200)).astype(np.float32)
    weights: tuple[Blocks | Floats, ...] = (blocks, floats)
    for weight, starts in itertools.product(weights, ((), (0, 19))):
        run, rank = session(model(weight, adapters=True, starts=starts), library), max(1, len(starts))
        few, one = weight.adapter(rng, 4 * rank), weight.adapter(rng, rank)
        for a, b in (few, one, (np.zeros_like(one[0]), one[1])):
            tensors = weight.held(a, b)
            places = np.ones((1, 1, 1), np.float32)
            got = run.run(None, {"x": x, "a": tensors[0], "b": tensors[1], "places": places})[0]
            added = x.astype(np.float64) @ a.astype(np.float64) @ (b * counted(len(b), 37, starts)).astype(np.float64)
            wanted = product(x, weight) + added
            off = float(np.abs(got - wanted).max() / np.abs(wanted).max())
            if not off < TOLERANCE:
                found.append(
                    f"{weight.operator}, an adapter of rank {len(b)} alone: off by {off:.1e} of the largest value"
                )
    return found


@dataclass(frozen=True, slots=True)
class Heads:
    """What an attention is made of: heads of queries, heads of keys and values, numbers in each, tokens that a token attends to."""

    queries: int
    keys: int
    size: int
    window: int = -1
    packed: bool = False

    def draw(self, rng: np.random.Generator, lengths: Sequence[int], places: int, tokens: int = 1) -> dict[str, Array]:
        """Return inputs for rows whose caches hold ``lengths`` tokens before these."""
        widths = {"query": self.queries, "key": self.keys, "value": self.keys}
        made = {n: rng.standard_normal((len(lengths), tokens, w * self.size)) for n, w in widths.items()}
        if self.packed:
            made = {"query": np.concatenate([*made.values()], -1)}
        for name in ("past_key", "past_value"):
            made[name] = rng.standard_normal((len(lengths), self.keys, places, self.size))
        angles = np.arange(places)[:, None] / 10 ** (4 * np.arange(self.size // 2) / self.size)
        made |= {"cos": np.cos(angles), "sin": np.sin(angles)}
        ends = np.array(lengths) + tokens
        counts = {"seqlens_k": ends - 1, "total_sequence_length": np.array(ends.max())}
        return {n: a.astype(np.float32) for n, a in made.items()} | {n: a.astype(np.int32) for n, a in counts.items()}

    def model(self) -> Any:
        """Return a model of one ``CacheAttention``."""
        names = ["query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length", "cos", "sin"]
        given = ["" if self.packed and name in {"key", "value"} else name for name in names]
        attributes: dict[str, Any] = {
            "num_heads": self.queries,
            "kv_num_heads": self.keys,
            "local_window_size": self.window,
            "scale": self.size**-0.5,
            "do_rotary": 1,
        }
        outputs = ["y", "present_key", "present_value"]
        integers = {"seqlens_k", "total_sequence_length"}
        graph = helper.make_graph(
            [helper.make_node("CacheAttention", given, outputs, domain=DOMAIN, **attributes)],
            "graph",
            [
                helper.make_tensor_value_info(name, TensorProto.INT32 if name in integers else TensorProto.FLOAT, None)
                for name in given
                if name
            ],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        )
        return _model_of(graph)

    def attend(self, feeds: dict[str, Array]) -> tuple[Array, Array, Array]:
        """Return what the operator returns, float64: the sums of values ``(B, S, H D)`` and the caches with the tokens in them."""
        query = feeds["query"].astype(np.float64)
        keys, values = (feeds[name].astype(np.float64) for name in ("past_key", "past_value"))
        ends = np.cumsum([self.queries * self.size, self.keys * self.size])
        query, key, value = np.split(query, ends, -1) if self.packed else (query, feeds["key"], feeds["value"])
        rows, tokens = query.shape[:2]
        out = np.zeros((rows, tokens, self.queries, self.size))
        for b, s in np.ndindex(rows, tokens):
            at = int(feeds["seqlens_k"][b]) - tokens + 1 + s
            turned = [self._turn(x[b, s].reshape(-1, self.size), feeds, at) for x in (query, key)]
            keys[b, :, at], values[b, :, at] = turned[1], value[b, s].reshape(-1, self.size)
            first = 0 if self.window < 0 else max(0, at + 1 - self.window)
            for h in range(self.queries):
                of = h * self.keys // self.queries
                scores = keys[b, of, first : at + 1] @ turned[0][h] * self.size**-0.5
                weights = np.exp(scores - scores.max())
                out[b, s, h] = weights @ values[b, of, first : at + 1] / weights.sum()
        return out.reshape(rows, tokens, -1), keys, values

    def _turn(self, x: Array, feeds: dict[str, Array], at: int) -> Array:
        one, other = np.split(x, 2, -1)
        cos, sin = (feeds[name][at].astype(np.float64) for name in ("cos", "sin"))
        return np.concatenate([one * cos - other * sin, other * cos + one * sin], -1)


def run_in_place(run: onnxruntime.InferenceSession, feeds: dict[str, Array]) -> tuple[Array, Array, Array]:
    """Run an attention on caches that it writes to, as sessions do; return what :meth:`Heads.attend` returns."""
    own = {name: array.copy() for name, array in feeds.items()}
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in own.items()}
    binding = run.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("y")
    for kind in ("key", "value"):
        binding.bind_ortvalue_output(f"present_{kind}", values[f"past_{kind}"])
    run.run_with_iobinding(binding)
    return binding.copy_outputs_to_cpu()[0], own["past_key"], own["past_value"]


ATTENTIONS = (
    (Heads(14, 2, 64, packed=True), (0, 30, 1100), 1),
    (Heads(4, 4, 80), (511, 512), 1),
    (Heads(3, 1, 16, window=100), (99, 700, 5), 1),
    (Heads(4, 2, 16), (9,), 5),
)
"""Attentions, lengths of the caches of some rows, and tokens of one call."""


def wrong_attention(library: Path) -> list[str]:
    """Return a line for each attention that the library computes wrongly."""
    found = []
    rng = np.random.default_rng(2)
    for heads, lengths, tokens in ATTENTIONS:
        feeds = heads.draw(rng, lengths, places=1200, tokens=tokens)
        run = session(heads.model(), library, threads=2)
        got = run_in_place(run, feeds)
        off = max(float(np.abs(a - b).max()) for a, b in zip(got, heads.attend(feeds), strict=True))
        kind = f"{heads.queries} heads of {heads.size} over {heads.keys}, {tokens} tokens behind {lengths}"
        if not off < TOLERANCE:
            found.append(f"attention, {kind}: off by {off:.1e}")
        shared = {"cos", "sin", "total_sequence_length"}
        for row in range(len(lengths)):
            alone = run_in_place(run, {n: a if n in shared else a[row : row + 1] for n, a in feeds.items()})
            if tokens == 1 and not np.array_equal(alone[0][0], got[0][row]):
                found.append(f"attention, {kind}: a row depends on the rows beside it")
    return found


def gates() -> Any:
    """Return a model of one ``GatedSilu``: ``gate`` and ``up`` to ``y``."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("gate", "up")]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(
        [helper.make_node("GatedSilu", ["gate", "up"], ["y"], domain=DOMAIN)], "graph", inputs, outputs
    )
    return _model_of(graph)


def wrong_gates(library: Path) -> list[str]:
    """Return a line if the library computes gates wrongly: of numbers of any size, as many as several threads take and some."""
    rng = np.random.default_rng(4)
    gate, up = (rng.standard_normal((3, 3001)) * 10 ** rng.uniform(-3, 2, (3, 3001)) for _ in range(2))
    wanted = gate / (1 + np.exp(-gate)) * up
    feeds = {"gate": gate.astype(np.float32), "up": up.astype(np.float32)}
    got = session(gates(), library, threads=2).run(None, feeds)[0]
    off = float((np.abs(got - wanted) / np.maximum(np.abs(wanted), 1e-20)).max())
    return [] if off < TOLERANCE else [f"gates: off by {off:.1e} of a value"]


EPSILON = 1e-3


def norms() -> Any:
    """Return a model of one ``SkipNorm``: ``a``, ``b`` and ``weight`` to ``y`` and ``sum``."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("a", "b", "weight")]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "sum")]
    node = helper.make_node("SkipNorm", ["a", "b", "weight"], ["y", "sum"], domain=DOMAIN, epsilon=EPSILON)
    return _model_of(helper.make_graph([node], "graph", inputs, outputs))


def wrong_norms(library: Path) -> list[str]:
    """Return a line for each norm that the library computes wrongly: of some rows, which one thread makes, and of many."""
    found = []
    rng = np.random.default_rng(5)
    for rows, columns in ((3, 1000), (40, 900), (2, 7)):
        a, b, weight = (rng.standard_normal(shape) for shape in ((rows, columns), (rows, columns), columns))
        a, b = (of * np.logspace(-3, 3, rows)[:, None] for of in (a, b))
        total = a + b
        wanted = total / np.sqrt((total**2).mean(-1, keepdims=True) + EPSILON) * weight, total
        feeds = {"a": a, "b": b, "weight": weight}
        got = session(norms(), library, threads=2).run(None, {n: v.astype(np.float32) for n, v in feeds.items()})
        for name, mine, right in zip(("norm", "sum"), got, wanted, strict=True):
            off = float((np.abs(mine - right).max(-1) / np.abs(right).max(-1)).max())
            if not off < TOLERANCE:
                found.append(f"norms, {rows} rows of {columns}: the {name} is off by {off:.1e}")
    return found


def counted(rank: int, columns: int, starts: Sequence[int]) -> Array:
    """Return which numbers of ``B`` ``(rank, columns)`` count: each part of the ranks has those from its start to the next one's."""
    if not starts:
        return np.ones((rank, columns), bool)
    at = np.arange(columns)
    parts = [(at >= a) & (at < b) for a, b in itertools.pairwise([*starts, columns])]
    return np.repeat(parts, rank // len(parts), 0)


def pieces(
    weight: Blocks | Floats,
    adapters: Sequence[tuple[Array, ...]],
    chosen: Array,
    ranks: int = 16,
    starts: Sequence[int] = (),
) -> dict[str, Array]:
    """Return the inputs for rows with these adapters ``(A, B)``: cut into pieces, the last of each filled up with zeros."""
    cut, columns = [], []
    parts = max(1, len(starts))
    for of, (a, b) in enumerate(adapters):
        rank = a.shape[1] // parts
        for first in range(0, rank, ranks):
            fill = (0, max(0, first + ranks - rank))
            some = slice(first, first + ranks)
            a_piece = np.hstack([np.pad(part[:, some], ((0, 0), fill)) for part in np.split(a, parts, 1)])
            b_piece = np.vstack([np.pad(part[some], (fill, (0, 0))) for part in np.split(b, parts)])
            cut.append(weight.held(a_piece, b_piece))
            columns.append(chosen == of)
    places = np.stack(columns, -1)[:, None].astype(np.float32)
    return {name: np.stack(of)[:, None] for name, of in zip("ab", zip(*cut, strict=True), strict=True)} | {
        "places": places
    }


def wrong(library: Path) -> list[str]:
    """Return a line for each thing that the library computes wrongly."""
    checks = (
        wrong_products,
        wrong_rows,
        wrong_floats,
        wrong_updates,
        wrong_ranks,
        wrong_attention,
        wrong_gates,
        wrong_norms,
    )
    return [line for check in checks for line in check(library)]


if __name__ == "__main__":
    lines = wrong(Path(sys.argv[1]))
    print("; ".join(lines))  # noqa: T201 - this is a command
    sys.exit(bool(lines))
