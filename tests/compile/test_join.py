# SPDX-License-Identifier: BSD-3-Clause
from collections import Counter

import numpy as np
import pytest

from QEfficient.compile.adapters import DropAdapterOutputs, FoldAdapterScaling, FoldAdapterTranspose, lowered_specs
from QEfficient.compile.attention import FuseCacheAttention
from QEfficient.compile.heads import FoldHeadSplits
from QEfficient.compile.join import JoinAttentionProjections
from QEfficient.compile.quantize import Precision, QuantizeWeights
from QEfficient.compile.rotary import RotaryIntoAttention
from QEfficient.contract import Manifest
from QEfficient.runtime.adapters import place
from QEfficient.runtime.session import OrtSession
from tests.tiny import SHAPE

# The joined kernel gets the same numbers; the adapter's sums may round to another 8-bit activation in what follows.
TOLERANCE = 0.02


def _quantized(made, precision=None):
    names = [spec.name for spec in Manifest.read(made.graph).adapter]
    model = made.load()
    for rewrite in (
        DropAdapterOutputs(),
        FoldAdapterTranspose(names),
        FoldAdapterScaling(names),
        FuseCacheAttention(),
        RotaryIntoAttention(SHAPE["max_position_embeddings"]),
        FoldHeadSplits(),
        QuantizeWeights(precision or Precision("int8")),
    ):
        model, _ = rewrite.apply(model)
    return model, JoinAttentionProjections(names)


def _operators(model):
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("style", ["llama", "qwen2", "gemma2", "mistral"])
def test_same_logits(exported, trace, tmp_path, style, symmetric):
    """With one product instead of three the base gives the same bits, and the adapter (q, v; none at k) its logits."""
    made = exported(style)
    results = []
    for joins in (False, True):
        model, join = _quantized(made, Precision("int8", symmetric=symmetric))
        products = _operators(model)["MatMulNBits"]
        if joins:
            model, changed = join.apply(model)
            assert changed
            assert _operators(model)["MatMulNBits"] == products - 2 * 2
            assert not join.apply(model)[1]
        session = made.session(model, tmp_path / f"joined-{joins}")
        adapted = np.concatenate(trace(session))
        session.set_adapter("base")
        results.append((np.concatenate(trace(session)), adapted))
    (base, adapted), (joined_base, joined) = results
    np.testing.assert_array_equal(base, joined_base)
    assert np.linalg.norm(joined - adapted) < TOLERANCE * np.linalg.norm(adapted) < np.linalg.norm(adapted - base)


def test_adapter_tensors_are_joined_when_they_are_loaded(exported):
    """The manifest says where each tensor goes; what is bound multiplies as the separate tensors do, at any rank."""
    made = exported("llama")
    model, join = _quantized(made)
    model, _ = join.apply(model)
    manifest = Manifest.read(made.graph)
    specs = {s.name: s for s in lowered_specs(model, manifest.adapter)}
    assert [s.name for s in specs.values()] == [s.name for s in manifest.adapter]
    parts = [s for s in specs.values() if s.joined and ".layers.1." in s.name]
    assert {s.columns for s in parts} == {(), (0, 128), (96, 128)}
    inputs = {v.name for v in model.graph.inputs}
    assert {s.joined or s.name for s in specs.values() if s.bound} <= inputs
    rng = np.random.default_rng(0)
    for rank in (1, 3):
        tensors = {
            s.name: rng.standard_normal([rank if isinstance(d, str) else d for d in s.shape]).astype(np.float32)
            for s in specs.values()
        }
        placed = place(tensors, list(specs.values()))
        assert all(t.flags.c_contiguous for t in placed.values())
        a, b = (placed[next(s.joined for s in parts if f"lora_{letter}" in s.name)] for letter in "AB")
        x = rng.standard_normal((2, 64)).astype(np.float32)
        expected = np.zeros((2, 128), np.float32)
        for module, start in (("q_proj", 0), ("v_proj", 96)):
            root = f"base_model.model.model.layers.1.self_attn.{module}"
            down, up = tensors[f"{root}.lora_A.weight"], tensors[f"{root}.lora_B.weight"]
            expected[:, start : start + len(up)] = x @ down.T @ up.T * tensors[f"{root}.scaling"]
        np.testing.assert_allclose(x @ a @ b, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("style", ["qwen3", "phi3", "gpt2"])
def test_left_alone(exported, style):
    """Norms between projection and attention, and projections that are one already, stay as they are."""
    model, join = _quantized(exported(style))
    before = _operators(model)
    assert not join.apply(model)[1]
    assert _operators(model) == before


def test_different_precisions_stay_apart(exported):
    """Keys that are held higher than queries and values are not joined with them."""
    model, join = _quantized(exported("llama"), Precision("int4", keep=("*k_proj*",)))
    assert not join.apply(model)[1]


def test_a_session_checks_the_adapters_own_names(exported, tmp_path):
    """Joined or not, an adapter is given by the names of its file."""
    made = exported("llama")
    model, join = _quantized(made)
    session = made.session(join.apply(model)[0], tmp_path / "program")
    assert isinstance(session, OrtSession)
    assert session.adapters == ("a",)
