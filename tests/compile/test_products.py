# SPDX-License-Identifier: BSD-3-Clause
import logging
from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
import torch

from QEfficient.compile import targets
from QEfficient.compile.program import compile_graph
from QEfficient.contract import KERNELS, MODEL_FILE, Manifest
from QEfficient.errors import ArtifactError, UnsupportedError
from QEfficient.kernels import library
from QEfficient.kernels.ranks import from_bytes
from QEfficient.runtime.session import OrtSession

# Adapters in 8 bits are off by 1.3 % of what they add. In the next layer some activations round to another of 255 steps then, as they
# would after any change; seen 0.3 to 2.0 % of logits, where this rounding itself takes 1.2 to 2.6 % (test_quantize.py).
TOLERANCE = 0.03
# And they are hardly further from float32 than ONNX Runtime's are, whose adapters are float32; seen 0.998 to 1.03 of its error.
NO_WORSE = 1.05
# Sums of float32 numbers in another order, through two layers; seen 4e-7.
FLOAT32 = 2e-6


pytestmark = pytest.mark.usefixtures("library")


def _operators(program):
    return Counter(node.op_type for node in ir.load(program / MODEL_FILE).graph)


def _off(expected, got):
    wrong = sum(float(np.square(a - b).sum()) for a, b in zip(expected, got, strict=True))
    return (wrong / sum(float(np.square(a).sum()) for a in expected)) ** 0.5


@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "mixed"])
@pytest.mark.parametrize(
    ("style", "options"),
    [
        ("llama", {"precision": "int4"}),
        ("qwen2", {"precision": "int8", "symmetric": False}),
        ("gpt2", {"precision": "int4", "block_size": 64, "symmetric": False}),
        ("phi3", {"precision": "int8"}),
    ],
)
def test_same_logits(exported, trace, style, options, mixed):
    """Prompts, chunks of several rows, single tokens give what ONNX Runtime's kernels give, with the adapter and with the base."""
    made, results = exported(style), []
    session = OrtSession(made.graph, threads=2)
    session.load_adapter("a", made.adapter)
    wanted = trace(session)
    session.set_adapter("a")
    wanted += trace(session)
    for target in ("onnxruntime-plain", "onnxruntime"):
        session = OrtSession(compile_graph(made.graph, target=target, mixed=mixed, **options), threads=2)
        session.load_adapter("a", made.adapter)
        base = trace(session)
        session.set_adapter("a")
        results.append(base + trace(session))
    assert 0 < _off(*results) < TOLERANCE
    plain, own = (_off(wanted, result) for result in results)
    assert own < NO_WORSE * plain


def test_every_product_and_every_adapter(exported):
    """No product is left to ONNX Runtime, and LoRA's matrices go into them; a bias stays with its product."""
    operators = _operators(compile_graph(exported("qwen2").graph, precision="int4"))
    assert operators["BlockProduct"] == 2 * 5 + 1  # queries, keys and values are one
    assert operators["MatMulNBits"] == operators["MatMul"] == 0
    plain = _operators(compile_graph(exported("qwen2").graph, precision="int4", target="onnxruntime-plain"))
    assert plain["MatMulNBits"] == 2 * 5 + 1
    assert plain["MatMul"] == 2 * 2 * 2
    assert plain["BlockProduct"] == 0


def test_a_tied_embedding_is_stored_once(exported):
    """The rows that tokens take come out of the weight that logits are multiplied by; an embedding of its own stays as it is."""
    tied = ir.load(compile_graph(exported("qwen2").graph, precision="int4") / MODEL_FILE)
    assert [name for name in tied.graph.initializers if "embed_tokens" in name and "int4" in name] == [
        "model.embed_tokens.weight_int4_in_strips"
    ]
    operators = Counter(node.op_type for node in tied.graph)
    assert (operators["BlockRows"], operators["GatherBlockQuantized"]) == (1, 0)
    own = _operators(compile_graph(exported("llama").graph, precision="int4"))
    assert (own["BlockRows"], own["GatherBlockQuantized"]) == (0, 1)


def test_zeros_beside_joined_adapters_are_not_read(exported):
    """Queries, keys and values are one product, and the ranks of each add to its own columns alone."""
    model = ir.load(compile_graph(exported("qwen2").graph, precision="int4") / MODEL_FILE)
    products = [node for node in model.graph if node.op_type == "BlockProduct"]
    starts = [tuple(node.attributes["starts"].as_ints()) for node in products if "starts" in node.attributes]
    queries, keys = 64, 32
    assert starts == [(0, queries + keys)] * 2  # the adapter changes queries and values


def test_small_blocks_are_left_alone(exported):
    """Blocks of 16 have no kernel of ours, and a program without one needs no library."""
    program = compile_graph(exported("llama").graph, precision="int4", block_size=16)
    assert not {"BlockProduct", "CacheAttention"} & set(_operators(program))
    assert KERNELS not in Manifest.read(program).options


HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "mixed"])
@pytest.mark.parametrize(("style", "dtype"), [("llama", "bfloat16"), ("qwen2", "float16"), ("gemma2", "bfloat16")])
def test_halves_give_the_logits_of_float32(exported, trace, style, dtype, mixed):
    """A checkpoint in 16 bits is multiplied as it is, and nothing is lost: what ONNX Runtime gives after a cast, off by float32's own rounding."""
    made, results = exported(style, HALVES[dtype]), []
    for target in ("onnxruntime-plain", "onnxruntime"):
        session = OrtSession(compile_graph(made.graph, target=target, mixed=mixed), threads=2)
        session.load_adapter("a", made.adapter)
        base = trace(session)
        session.set_adapter("a")
        results.append(base + trace(session))
    assert 0 < _off(*results) < FLOAT32


def test_halves_are_read_where_they_lie(exported):
    """The program has no copy of the checkpoint's matrices, and ONNX Runtime makes none: nothing casts them."""
    graph = exported("qwen2", torch.bfloat16).graph
    program = compile_graph(graph)
    assert _operators(program)["Bfloat16Product"] == 2 * 7 + 1
    assert _operators(program)["MatMul"] == 0
    model = ir.load(program / MODEL_FILE)
    large = {
        v.name: v for v in model.graph.initializers.values() if len(v.shape) == 2 and v.dtype == ir.DataType.BFLOAT16
    }
    assert len(large) == 2 * 7 + 1  # the embedding is tied to the head
    assert {use.node.op_type for v in large.values() for use in v.uses()} == {"Bfloat16Product", "Gather"}
    assert {v.const_value.location for v in large.values()} == {"weights.safetensors"}
    assert (program / "weights.safetensors").samefile(graph / "weights.safetensors")


@pytest.mark.parametrize(("style", "products"), [("qwen2", 2 * 7 + 1), ("gpt2", 2 * 4 + 1)])
def test_rounded_to_bfloat16(exported, trace, style, products):
    """A float32 checkpoint at bf16: what PyTorch's rounding of the weights gives, each weight's error noted; nothing else is rounded."""
    made = exported(style)
    program = compile_graph(made.graph, precision="bf16")
    assert _operators(program)["Bfloat16Product"] == products
    assert _operators(program)["MatMul"] + _operators(program)["Gemm"] == (0 if style == "qwen2" else 2 * 2 * 2)
    errors = Manifest.read(program).options["quantized"]
    assert len(errors) == products + (style == "gpt2")  # positions are an embedding, too; the other is tied to the head
    assert all(1e-4 < e["error"] < 4e-3 and e["bits"] == 16 for e in errors.values())
    wanted, results = OrtSession(made.graph, threads=2), []
    for session in (wanted, OrtSession(program, threads=2)):
        session.load_adapter("a", made.adapter)
        session.set_adapter("a")
        results.append(trace(session))
    assert 1e-4 < _off(*results) < 0.01


def test_float32_needs_no_kernels(exported, monkeypatch):
    """A checkpoint in float32 at precision fp32 is compiled without them: nobody waits for a compiler."""
    monkeypatch.setattr(targets, "_why_no_kernels", lambda: pytest.fail("asked for kernels"))
    program = compile_graph(exported("llama").graph)
    assert KERNELS not in Manifest.read(program).options


def test_halves_in_blocks(exported):
    """From a checkpoint in 16 bits, too, a bias stays with its product, so queries, keys and values become one."""
    operators = _operators(compile_graph(exported("qwen2", torch.bfloat16).graph, precision="int4"))
    assert operators["BlockProduct"] == 2 * 5 + 1
    assert operators["Bfloat16Product"] == operators["MatMul"] == 0


def test_adapters_are_held_in_8_bits(exported):
    """The manifest says so, and a session takes the adapter's file as it is; what it holds is the adapter with its scaling."""
    made = exported("llama")
    program = compile_graph(made.graph, precision="int4")
    manifest = Manifest.read(program)
    assert {s.held for s in manifest.adapter if s.bound} == {"int8"}
    session = OrtSession(program)
    session.load_adapter("a", made.adapter)
    placed = session.placed_adapter("a")
    assert {t.dtype for t in placed.values()} == {np.dtype("int8")}
    spec = next(s for s in manifest.adapter if s.name.endswith("down_proj.lora_B.weight"))
    wanted = made.adapter[spec.name].T * made.adapter[spec.scaled_by]
    steps = np.abs(wanted).max(1, keepdims=True) / 127
    assert (np.abs(from_bytes(placed[spec.name], 0) - wanted) <= 0.5001 * steps).all()


def test_values_that_16_bits_cannot_hold(exported, trace):
    """Each rank has a scale of its own, so a value of 8e4 is no other than one of 8."""
    made, results = exported("llama"), []
    tensors = made.adapter
    name = next(n for n in tensors if n.endswith("v_proj.lora_B.weight"))
    tensors[name] = tensors[name] * (4e4 / np.abs(tensors[name]).max())  # 8e4 with its scaling
    for target in ("onnxruntime-plain", "onnxruntime"):
        session = OrtSession(compile_graph(made.graph, target=target, precision="int8"), threads=2)
        session.load_adapter("a", tensors)
        session.set_adapter("a")
        results.append(trace(session))
    assert 0 < _off(*results) < TOLERANCE


def test_programs_are_tied_to_the_kernels(exported, tmp_path, monkeypatch):
    """Other sources make another program, and do not run one that was made for these."""
    graph = exported("llama").graph
    program = compile_graph(graph, precision="int4", out=tmp_path)
    monkeypatch.setattr(targets, "sources", lambda: "another")
    assert compile_graph(graph, precision="int4", out=tmp_path) != program
    assert compile_graph(graph, out=tmp_path) == compile_graph(graph, out=tmp_path)
    monkeypatch.setattr("QEfficient.runtime.session.sources", lambda: "another")
    with pytest.raises(
        ArtifactError, match="compiled for kernels of another version of this package; compile its graph again"
    ):
        OrtSession(program)


def test_without_a_compiler(exported, tmp_path, monkeypatch, caplog):
    """What is compiled then runs on ONNX Runtime's kernels, and a warning says why; what was compiled before is refused."""
    made = exported("llama")
    program = compile_graph(made.graph, precision="int4", out=tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    for function in (library.library, library.why_not, targets._why_no_kernels):
        function.cache_clear()
    try:
        with pytest.raises(
            ArtifactError, match=r"uses kernels that this machine cannot have: they need a C\+\+ compiler"
        ):
            OrtSession(program)
        with caplog.at_level(logging.WARNING):
            plain = compile_graph(made.graph, precision="int4", out=tmp_path)
            compile_graph(made.graph, precision="int8", out=tmp_path)
            with pytest.raises(UnsupportedError, match="bf16 runs on kernels made for this CPU only: they need a C"):
                compile_graph(made.graph, precision="bf16", out=tmp_path)
        assert [r.message for r in caplog.records if r.name == "qefficient.compile"] == [
            "products run on ONNX Runtime's kernels, not on those made for this CPU: they need a C++ compiler, "
            "and $CXX is 'no-such-compiler', which is not there; install one"
        ]
        assert plain != program
        OrtSession(plain).load_adapter("a", made.adapter)
    finally:
        for function in (library.library, library.why_not, targets._why_no_kernels):
            function.cache_clear()
