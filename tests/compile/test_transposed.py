# SPDX-License-Identifier: BSD-3-Clause
from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from QEfficient.compile.adapters import DropAdapterOutputs, FoldAdapterScaling, FoldAdapterTranspose, lowered_specs
from QEfficient.compile.program import compile_graph
from QEfficient.compile.transposed import TransposeAdapterProducts
from QEfficient.contract import MODEL_FILE, AdapterSpec, Manifest
from QEfficient.runtime.adapters import place

TOLERANCE = 1e-5  # sums in another order


def _names(made):
    return [spec.name for spec in Manifest.read(made.graph).adapter]


def _folded(made):
    model = made.load()
    for rewrite in (DropAdapterOutputs(), FoldAdapterTranspose(_names(made)), FoldAdapterScaling(_names(made))):
        model, _ = rewrite.apply(model)
    return model


@pytest.mark.parametrize("style", ["llama", "gpt2", "phi3"])
def test_same_logits_from_matrices_as_the_file_has_them(exported, trace, tmp_path, style):
    """``x @ A`` sums over the last axis of ``A``, which is bound as it stands in the adapter's file; ``B`` stays turned."""
    made = exported(style)
    expected = trace(made.session(_folded(made), tmp_path / "before"))
    model, changed = TransposeAdapterProducts(_names(made)).apply(_folded(made))
    assert changed
    tensors = [n for n in _names(made) if "lora_A" in n]
    assert Counter(n.op_type for n in model.graph)["FusedMatMul"] == len(tensors)
    specs = {s.name: s for s in lowered_specs(model, Manifest.read(made.graph).adapter)}
    shapes = {v.name: tuple(str(d) for d in v.shape) for v in model.graph.inputs}
    for name in tensors:
        assert specs[name].perm == ()
        assert specs[name.replace("lora_A", "lora_B")].perm == (1, 0)
        assert shapes[name] == tuple(str(d) for d in specs[name].shape)
    for a, b in zip(expected, trace(made.session(model, tmp_path / "after")), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)
    assert not TransposeAdapterProducts(_names(made)).apply(model)[1]


@pytest.mark.parametrize("other", ["Neg", "MatMul"])
def test_a_matrix_used_otherwise_too_stays_as_it_is(exported, other):
    """Only a right operand of products is taken transposed; the others still are."""
    made = exported("llama")
    model = _folded(made)
    value = next(v for v in model.graph.inputs if v.name.endswith("layers.0.self_attn.q_proj.lora_A.weight"))
    left = [value] if other == "Neg" else [value, next(v for v in model.graph.inputs if "q_proj.lora_B" in v.name)]
    model.graph.append(ir.node(other, left))
    TransposeAdapterProducts(_names(made)).apply(model)
    perms = {s.name: s.perm for s in lowered_specs(model, Manifest.read(made.graph).adapter) if "lora_A" in s.name}
    assert perms.pop(value.name) == (1, 0)
    assert set(perms.values()) == {()}


def test_nothing_but_the_adapters_matrices(exported):
    """The base's products stay what they were."""
    made = exported("llama")
    model = _folded(made)
    assert not TransposeAdapterProducts([]).apply(model)[1]
    assert "FusedMatMul" not in {n.op_type for n in model.graph}


@pytest.mark.parametrize("mixed", [False, True])
def test_joined_and_masked_products_too(exported, mixed):
    """Each pair of a program is one product of either kind."""
    program = compile_graph(exported("llama").graph, precision="int8", mixed=mixed)
    model = ir.load(program / MODEL_FILE)
    bound = {s.joined or s.name for s in Manifest.read(program).adapter if s.bound}
    users = [use.node for v in model.graph.inputs if v.name in bound for use in v.uses()]
    kinds = Counter(n.op_type for n in users)
    assert kinds == {"FusedMatMul": len(bound) // 2, "MatMul": len(bound) // 2}
    assert any(s.joined for s in Manifest.read(program).adapter)


@pytest.mark.parametrize("perm", [(), (1, 0)])
def test_joined_either_way(perm):
    """Parts of a joined input stand along the rank, wherever the program wants that axis; those with columns on a diagonal."""
    rng = np.random.default_rng(0)
    a, b, c, d = (rng.standard_normal(s).astype(np.float32) for s in ((2, 5), (2, 5), (3, 2), (4, 2)))
    specs = [
        AdapterSpec("a", ("rank", 5), perm=perm, joined="down"),
        AdapterSpec("b", ("rank", 5), perm=perm, joined="down"),
        AdapterSpec("c", (3, "rank"), perm=perm, joined="up", columns=(0, 9)),
        AdapterSpec("d", (4, "rank"), perm=perm, joined="up", columns=(5, 9)),
    ]
    placed = place({"a": a, "b": b, "c": c, "d": d}, specs)
    up = np.zeros((9, 4), np.float32)
    up[0:3, 0:2], up[5:9, 2:4] = c, d
    for name, whole in (("down", np.concatenate([a, b])), ("up", up)):
        np.testing.assert_array_equal(placed[name], whole.T if perm else whole)
        assert placed[name].flags.c_contiguous
