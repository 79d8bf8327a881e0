# SPDX-License-Identifier: BSD-3-Clause
import itertools

import ml_dtypes
import numpy as np
import pytest

from QEfficient.kernels.check import TOLERANCE, Blocks, Floats, model, pieces, product, rows, session, wrong

KINDS = list(itertools.product((4, 8), (32, 64, 128, 256), (False, True)))


@pytest.mark.parametrize(("bits", "block_size", "zeros"), KINDS)
def test_products(library, bits, block_size, zeros):
    """Rows that end within a block, weights that end within a strip, any number of rows: right, and each as it is alone."""
    rng = np.random.default_rng(bits + block_size)
    for columns, count in ((1, 3), (31, 1), (200, 9), (417, 5), (896, 16), (3104, 5)):
        weight = Blocks.random(rng, count, columns, bits=bits, block_size=block_size, zeros=zeros)
        run = session(model(weight), library, threads=2)
        x = rng.standard_normal((14, columns)).astype(np.float32) * 10 ** rng.uniform(-3, 3, (14, 1)).astype(np.float32)
        got, wanted = run.run(None, {"x": x})[0], product(x, weight)
        assert (np.abs(got - wanted).max(1) <= TOLERANCE * np.abs(wanted).max(1)).all()
        for some in (1, 4, 7, 8):
            np.testing.assert_array_equal(run.run(None, {"x": x[:some]})[0], got[:some])


@pytest.mark.parametrize(("bits", "block_size", "zeros"), KINDS)
def test_rows(library, bits, block_size, zeros):
    """Rows of a weight in blocks are those numbers, to the last bit; ids may have any dimensions."""
    weight = Blocks.random(np.random.default_rng(0), 37, 200, bits=bits, block_size=block_size, zeros=zeros)
    run = session(rows(weight), library, threads=2)
    ids = np.array([[0, 36, 5], [16, 15, 36]])
    wanted = weight.dequantized().astype(np.float32)
    np.testing.assert_array_equal(run.run(None, {"ids": ids})[0], wanted[ids])
    assert run.run(None, {"ids": ids[:, :0]})[0].shape == (2, 0, 200)
    for wrong_id in (-1, 37):
        with pytest.raises(Exception, match="no row of an id"):
            run.run(None, {"ids": np.array([0, wrong_id])})


@pytest.mark.parametrize("held", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_products_of_floats(library, held):
    """Rows that end within what is loaded at once or within a panel, weights in odd numbers, few rows and many."""
    rng = np.random.default_rng(0)
    for columns, count in ((1, 3), (7, 1), (200, 16), (417, 35), (448, 9), (3104, 20)):
        weight = Floats(rng.standard_normal((count, columns)).astype(held))
        run = session(model(weight), library, threads=2)
        x = rng.standard_normal((31, columns)).astype(np.float32) * 10 ** rng.uniform(-3, 3, (31, 1)).astype(np.float32)
        for some in (1, 2, 3, 4, 7, 15, 16, 17, 31):
            got, wanted = run.run(None, {"x": x[:some]})[0], product(x[:some], weight)
            assert (np.abs(got - wanted).max(1) <= TOLERANCE * np.abs(wanted).max(1)).all()


def test_every_float(library):
    """All numbers of 16 bits become the same float32: one product by each."""
    for held in (ml_dtypes.bfloat16, np.float16):
        numbers = np.arange(1 << 16, dtype=np.uint16).view(held)
        weight = Floats(numbers[np.isfinite(numbers.astype(np.float32))][:, None])
        for count in (1, 40):
            got = session(model(weight), library).run(None, {"x": np.ones((count, 1), np.float32)})[0]
            np.testing.assert_array_equal(got, np.tile(weight.data[:, 0].astype(np.float32), (count, 1)))


def test_dimensions_in_front(library):
    """``x`` may have several dimensions, none of them any size."""
    weight = Blocks.random(np.random.default_rng(0), 6, 64, bits=4, block_size=32, zeros=False)
    run = session(_with_shape(model(weight), [None, None, 64]), library)
    x = np.random.default_rng(1).standard_normal((2, 3, 64)).astype(np.float32)
    got = run.run(None, {"x": x})[0]
    np.testing.assert_allclose(got.reshape(6, 6), product(x.reshape(6, 64), weight), rtol=0, atol=1e-3)
    assert run.run(None, {"x": x[:, :0]})[0].shape == (2, 0, 6)


def test_zeros_and_what_is_no_number(library):
    """A row of zeros gives the bias, exactly; one that is not finite is NaN, and so is no other."""
    rng = np.random.default_rng(0)
    weight = Blocks.random(rng, 6, 96, bits=4, block_size=32, zeros=False)
    bias = rng.standard_normal(6).astype(np.float32)
    x = rng.standard_normal((4, 96)).astype(np.float32)
    x[0], x[1, 40], x[2, 50] = 0, np.nan, np.inf
    got = session(model(weight, bias), library).run(None, {"x": x})[0]
    np.testing.assert_array_equal(got[0], bias)
    assert np.isnan(got).all(1).tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("a", "b", "places", "message"),
    [
        ((160, 4), (5, 70), (1, 1, 1), "a and b are not"),
        ((159, 4), (4, 70), (1, 1, 1), "a and b are not"),
        ((96, 4), (4, 6), (1, 1, 1), "with the tails"),
        ((2, 1, 160, 4), (1, 1, 4, 70), (3, 1, 2), "a and b are not"),
        ((2, 1, 160, 4), (2, 1, 4, 70), (3, 1, 1), "places do not fit"),
        ((2, 1, 160, 4), (2, 1, 4, 70), (2, 1, 2), "places do not fit"),
    ],
)
def test_adapters_of_other_shapes_are_refused(library, a, b, places, message):
    """Shapes that do not fit are an error, not memory of somebody else."""
    weight = Blocks.random(np.random.default_rng(0), 6, 96, bits=4, block_size=32, zeros=False)
    run = session(model(weight, adapters=True), library)
    feeds = {"a": np.zeros(a, np.int8), "b": np.zeros(b, np.int8), "places": np.ones(places, np.float32)}
    with pytest.raises(Exception, match=message):
        run.run(None, {"x": np.zeros((3, 96), np.float32), **feeds})


@pytest.mark.parametrize("starts", [(6,), (-1, 3), (3, 2)], ids=str)
def test_starts_that_are_no_columns_are_refused(library, starts):
    """They are an error when the program is loaded."""
    weight = Blocks.random(np.random.default_rng(0), 6, 96, bits=4, block_size=32, zeros=False)
    with pytest.raises(Exception, match="starts are not columns"):
        session(model(weight, adapters=True, starts=starts), library)


def test_ranks_that_are_not_as_many_for_each_start_are_refused(library):
    """Three ranks for two kinds of columns are an error."""
    weight = Blocks.random(np.random.default_rng(0), 6, 96, bits=4, block_size=32, zeros=False)
    run = session(model(weight, adapters=True, starts=(0, 2)), library)
    feeds = {
        "a": np.zeros((160, 3), np.int8),
        "b": np.zeros((3, 70), np.int8),
        "places": np.ones((1, 1, 1), np.float32),
    }
    with pytest.raises(Exception, match="not as many for each"):
        run.run(None, {"x": np.zeros((3, 96), np.float32), **feeds})


def test_rows_of_several_tokens(library):
    """Prompts of several rows: each token takes its row's adapter."""
    rng = np.random.default_rng(0)
    weight = Blocks.random(rng, 40, 96, bits=8, block_size=32, zeros=True)
    adapters = [weight.adapter(rng, r) for r in (3, 20)]
    run = session(_with_shape(model(weight, adapters=True), [None, None, 96]), library)
    x = rng.standard_normal((2, 5, 96)).astype(np.float32)
    got = run.run(None, {"x": x, **pieces(weight, adapters, np.array([1, 0]))})[0]
    for row, of in enumerate((1, 0)):
        a, b = (t.astype(np.float64) for t in adapters[of])
        wanted = product(x[row], weight) + x[row] @ a @ b
        np.testing.assert_allclose(got[row], wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max())


FAULTS = {
    "a bias that is left out": ("products.h", "std::memcpy(bias, w.bias + n, left * sizeof(float))", "(void)0"),
    "another zero point": ("products.h", "-(1 << (Format::kBits - 1))", "0"),
    "scales of the block before": ("products.h", "scales += kStrip;", "scales += b % 2 * kStrip;"),
    "zero points of the first block": ("products.h", "zeros += kStrip;", "zeros += 0;"),
    "a block that is left out": ("products.h", "b < w.blocks; ++b", "b + 1 < w.blocks; ++b"),
    "what fills a block": ("products.h", "std::memset(numbers + some, 0,", "std::memset(numbers + some, 1,"),
    "a sum of a row alone that is left out": ("products.h", "m < M * kChains; ++m", "m < M; ++m"),
    "rows of an embedding with columns that change places": (
        "products.h",
        "k % 2 ? held >> 4 : held & 15",
        "k % 2 ? held & 15 : held >> 4",
    ),
    "a piece for all rows": ("updates.h", "bool used = all;", "bool used = true;"),
    "floats of half the size": ("floats.h", "_mm256_cvtepu16_epi32(bits), 16)", "_mm256_cvtepu16_epi32(bits), 15)"),
    "only the last part of deep panels": ("floats.h", "depth, k == 0, y", "depth, true, y"),
    "columns at the end that are left out": (
        "floats.h",
        "for (; k < columns; k += kLanes)",
        "for (; k + kLanes <= columns; k += kLanes)",
    ),
    "ranks that are left out": (
        "updates.h",
        "while (depth > 0 && none(depth - 1)) --depth;",
        "depth /= 2;",
    ),
    "columns that belong to others": ("updates.h", "std::max(begin, pieces.starts[s])", "begin"),
    "what the quarters leave over": (
        "updates.h",
        "k = kQuarters * each; k < depth",
        "k = kQuarters * each; k + 1 < depth",
    ),
    "quarters of rows together that are not those of one alone": (
        "updates.h",
        "depth / kQuarters * quarter",
        "depth * quarter / kQuarters",
    ),
    "an adapter that passes for the bare base": (
        "updates.h",
        "return p[0] == 0 && std::memcmp",
        "return std::memcmp(p, p, 1) == 0 || std::memcmp",
    ),
    "scales of ranks that are left out": ("updates.h", "*= scale;", "*= 1.f;"),
    "scales of another rank": ("updates.h", "pieces.scale(use.piece, k)", "pieces.scale(use.piece, 0)"),
    "gates that are left out": ("gates.h", "_mm256_div_ps(gate, below)", "gate"),
    "norms without what is left over of a row": ("norms.h", "total += sum[i] * sum[i];", "(void)0;"),
    "norms of other rows": ("operators.cpp", "c.b + at, c.weight", "c.b, c.weight"),
    "a token that attends to all but itself": ("attention.h", "end = last[b] + 1;", "end = std::max(1, last[b]);"),
    "heads that are turned the other way": ("attention.h", "x[i + half] * c + x[i] * s", "x[i + half] * c - x[i] * s"),
    "weights of other sizes": (
        "attention.h",
        "_mm256_fmadd_ps(_mm256_set1_ps(factors[h])",
        "_mm256_fmadd_ps(_mm256_set1_ps(1.f)",
    ),
    "parts that count alike": ("attention.h", "std::exp(of(p)[size] - largest)", "1.f"),
    "rows that depend on others": (
        "products.h",
        "m += Rows::height(m, count)) {",
        "m += Rows::height(m, count)) { y[0] += count;",
    ),
}


@pytest.mark.parametrize(
    "fault",
    [pytest.param(f, marks=pytest.mark.slow) if i > 1 else f for i, f in enumerate(FAULTS)],
)
def test_the_check_sees_a_fault(built, fault):
    """A library that computes something else is not used."""
    faulty = built(FAULTS[fault])
    assert wrong(faulty) != []


def test_the_check_is_silent(library):
    """The library of this machine is right."""
    assert wrong(library) == []


EMULATED = """
inline __m256i dpbusd(__m256i sums, __m256i w, __m256i x) {
  int32_t s[8]; uint8_t u[32]; int8_t v[32];
  std::memcpy(s, &sums, 32); std::memcpy(u, &w, 32); std::memcpy(v, &x, 32);
  for (int i = 0; i < 32; ++i) s[i / 4] += u[i] * v[i];
  std::memcpy(&sums, s, 32);
  return sums;
}
using Integers = __m256i;"""
NARROW = ("registers.h", "#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)", "#if 0")


@pytest.mark.slow
def test_cpus_with_vnni_in_narrow_registers(built):
    """What they compile to is right, with their instruction written out, so that any CPU can tell."""
    path = built(
        NARROW,
        ("registers.h", "#define HAS_VNNI 0", "#define HAS_VNNI 1"),
        ("registers.h", "using Integers = __m256i;", EMULATED),
        ("registers.h", "_mm256_dpbusd_avx_epi32(", "dpbusd("),
    )
    assert wrong(path) == []


@pytest.mark.slow
def test_cpus_without_wide_registers(built):
    """What they compile to is right on CPUs that have them, too."""
    assert wrong(built(NARROW)) == []


def _with_shape(made, shape):
    made.graph.input[0].type.tensor_type.shape.Clear()
    for size in shape:
        dim = made.graph.input[0].type.tensor_type.shape.dim.add()
        if size is not None:
            dim.dim_value = size
    return made
