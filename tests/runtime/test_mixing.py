# SPDX-License-Identifier: BSD-3-Clause
"""Adapters cut into pieces: each row gets its own adapter's update, and no more is multiplied than is in use."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from peft import LoraConfig

from QEfficient.compile.program import compile_graph
from QEfficient.contract import ADAPTER_MASK, BASE, KERNELS, MIXED, AdapterSpec, Manifest
from QEfficient.errors import ArtifactError
from QEfficient.export.torch_to_onnx import export_graph
from QEfficient.peft.adapters import Adapter, fit
from QEfficient.runtime.aligned import LINE
from QEfficient.runtime.engine import Engine
from QEfficient.runtime.mixing import PIECE, Mixture
from QEfficient.runtime.requests import Request
from QEfficient.runtime.slots import SlotSession
from tests.runtime.test_engine import greedy, ids_of

# Two modules of one kind, whose matrices are joined (their B on a diagonal), and one of another.
SPECS = (
    AdapterSpec("q.A", ("rank", 6), perm=(1, 0), joined="qv.A"),
    AdapterSpec("v.A", ("rank", 6), perm=(1, 0), joined="qv.A"),
    AdapterSpec("q.B", (5, "rank"), perm=(1, 0), joined="qv.B", columns=(0, 8)),
    AdapterSpec("v.B", (3, "rank"), perm=(1, 0), joined="qv.B", columns=(5, 8)),
    AdapterSpec("o.A", (4, "rank")),
    AdapterSpec("o.B", ("rank", 7)),
)
KINDS = [["qv.A", "qv.B"], ["o.A", "o.B"]]
RANKS = {"r1": 1, "r16": PIECE, "r17": PIECE + 1, "r33": 2 * PIECE + 1, "r64": 64, "no-o": 8, "no-qv": 20}


def placed(name):
    """Return an adapter of :data:`RANKS` as a session binds it."""
    rank, rng = RANKS[name], np.random.default_rng(len(name) + RANKS[name])
    shapes = {"qv.A": (6, 2 * rank), "qv.B": (2 * rank, 8), "o.A": (4, rank), "o.B": (rank, 7)}
    made = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    made["qv.B"][:rank, 5:] = made["qv.B"][rank:, :5] = 0
    if name.startswith("no-"):
        made[f"{name[3:]}.B"][:] = 0
    return made | {ADAPTER_MASK: np.ones((1, 1, rank), np.float32)}


def updates(mixture, rows):
    """Return ``A @ B`` of each kind for each row, as a program adds up the pieces."""
    mask, start = mixture.mask(rows)[1], 0
    made = []
    for a, b in KINDS:
        products = (mixture.tensors[a] @ mixture.tensors[b])[:, 0]
        mine = mask[:, :, start : start + len(products)].sum(axis=1)
        made.append(np.einsum("bc,cio->bio", mine, products))
        start += len(products)
    assert start == mask.shape[2]
    return made


@pytest.mark.parametrize("seed", range(8))
def test_adapters_that_come_and_go(seed):
    """Whatever came before: every row has its adapter's update, the base has none, few pieces are unused, old ones are found again."""
    rng, mixture = np.random.default_rng(seed), Mixture(SPECS, KINDS)
    for _ in range(40):
        rows = [str(n) for n in rng.choice([*RANKS, BASE], rng.integers(2, 9))]
        if len({*rows}) < 2:
            continue
        used = {name: placed(name) for name in rows if name != BASE}
        before = dict(mixture.tensors)
        if not mixture.hold(used):
            assert all(t.ctypes.data == before[n].ctypes.data for n, t in mixture.tensors.items())
        for kind, update in zip(KINDS, updates(mixture, rows), strict=True):
            wanted = [used[n][kind[0]] @ used[n][kind[1]] if n != BASE else np.zeros(update.shape[1:]) for n in rows]
            np.testing.assert_allclose(update, wanted, atol=1e-4)
            needed = sum(-(-RANKS[n] // PIECE) for n in used if used[n][kind[1]].any())
            assert max(1, needed) <= len(mixture.tensors[kind[0]]) <= max(2, needed + 1, needed / 0.75)
        if rng.random() < 0.3:
            mixture.forget(str(rng.choice([*RANKS])))


def test_a_module_that_an_adapter_lacks_has_no_piece_of_it():
    """Ranks of different adapters are not padded to each other, only to a multiple of a piece."""
    mixture = Mixture(SPECS, KINDS)
    mixture.hold({name: placed(name) for name in ("r1", "r17", "no-o", "no-qv")})
    assert mixture.tensors["qv.A"].shape == (1 + 2 + 1, 1, 6, 2 * PIECE)
    assert mixture.tensors["o.B"].shape == (1 + 2 + 2, 1, PIECE, 7)


def test_memory_of_many_pieces_is_given_back():
    """After one call with great ranks, small ones keep no more than a few times their own memory."""
    mixture = Mixture(SPECS, KINDS)
    mixture.hold({"r64": placed("r64"), "r33": placed("r33"), "r17": placed("r17"), "r1": placed("r1")})
    mixture.hold({"r1": placed("r1")})
    held = mixture.tensors["o.A"]
    assert held.base.nbytes <= 8 * held[0].nbytes + LINE
    np.testing.assert_allclose(
        updates(mixture, ["r1", BASE])[1][0], placed("r1")["o.A"] @ placed("r1")["o.B"], atol=1e-5
    )


@pytest.fixture(scope="module")
def many(tiny):
    """Add adapters of other ranks and fewer targets to the tiny model; return their tensors."""
    kinds = {"r64": (64, None), "r17": (17, None), "down": (16, ["down_proj"]), "qv": (8, ["q_proj", "v_proj"])}
    made = dict(tiny.adapters)
    torch.manual_seed(0)
    for name, (rank, targets) in kinds.items():
        targets = targets or ["q_proj", "v_proj", "down_proj"]
        config = LoraConfig(r=rank, lora_alpha=2 * rank**0.5, target_modules=targets, init_lora_weights=False)
        tiny.model.add_adapter(name, config)
        made[name] = fit(Adapter.from_model(tiny.model, name), Manifest.read(tiny.graph))
    tiny.model.eval()
    return made


@pytest.mark.parametrize("slots", [3, 8])
def test_ranks_from_2_to_64_and_fewer_targets_in_one_batch(tiny, many, slots):
    """Rows that share an adapter, the base, prompts in chunks beside rows that decode, all joining and leaving: PyTorch's tokens."""
    rng, names = np.random.default_rng(slots), [*many, BASE]
    wanted = [
        (rng.integers(0, 97, int(rng.integers(1, 14))).tolist(), str(rng.choice(names)), int(rng.integers(2, 10)))
        for _ in range(24)
    ]
    program = compile_graph(tiny.graph, mixed=True)
    with Engine(program, slots=slots, ctx_len=32, threads=1, chunk_len=5) as engine:
        for name, tensors in many.items():
            engine.load_adapter(name, tensors)
        streams = engine.submit_all([Request(prompt_ids=p, adapter=a, max_new_tokens=n) for p, a, n in wanted])
        got = [ids_of(stream) for stream in streams]
    assert got == [greedy(tiny, *one) for one in wanted]


@pytest.mark.parametrize("target", ["onnxruntime", "onnxruntime-plain"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_weights_in_blocks(tiny, many, precision, target):
    """The logits of each row of a mix are those of the row alone, in joined projections too; with kernels of our own to the last bit."""
    program = compile_graph(tiny.graph, mixed=True, precision=precision, target=target)
    session = SlotSession(program, threads=1)
    for name, tensors in many.items():
        session.load_adapter(name, tensors)
    rows = ["one", "qv", BASE, "r64", "down", "r64", "r17"]
    ids = np.arange(5, 5 + len(rows))[:, None]
    session.allocate(len(rows), 16)
    together = session.run_slots(0, ids, np.zeros_like(ids), rows)
    alone = np.concatenate([session.run_slots(i, ids[i : i + 1], np.zeros((1, 1)), rows[i : i + 1]) for i in range(7)])
    base = session.run_slots(0, ids, np.zeros_like(ids), [BASE] * len(rows))
    np.testing.assert_array_equal(together[2], base[2])
    if KERNELS in Manifest.read(program).options:
        np.testing.assert_array_equal(together, alone)
    # ONNX Runtime adds in another order for several rows, so 8-bit activations may round another way, by far less than an adapter does.
    assert np.abs(together - alone).max() < 0.05 * np.abs(alone - base).max()


def test_weights_in_halves(tiny, many, tmp_path):
    """A base in bfloat16: rows of a mix get the logits that they get alone, and those of ONNX Runtime's kernels, by float32's rounding."""
    model = copy.deepcopy(tiny.model)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    graph = export_graph(model, tmp_path / "graph", adapter_name="one")
    rows, made = ["one", "qv", BASE, "r64", "down", "r64", "r17"], []
    ids = np.arange(5, 5 + len(rows))[:, None]
    for target in ("onnxruntime", "onnxruntime-plain"):
        session = SlotSession(compile_graph(graph, mixed=True, target=target), threads=1)
        for name, tensors in many.items():
            session.load_adapter(name, tensors)
        session.allocate(len(rows), 16)
        made.append(session.run_slots(0, ids, np.zeros_like(ids), rows))
        made += [
            np.concatenate([session.run_slots(i, ids[i : i + 1], np.zeros((1, 1)), rows[i : i + 1]) for i in range(7)])
        ]
    for other in made[1:]:
        np.testing.assert_allclose(other, made[0], rtol=0, atol=2e-6 * np.abs(made[0]).max())
    assert np.abs(made[0][0] - made[0][3]).max() > 0.1 * np.abs(made[0]).max()


def test_a_program_of_an_older_version_is_refused(tiny, tmp_path):
    """Its manifest says that it mixes, but not what."""
    manifest = Manifest.read(tiny.program)
    dataclasses.replace(manifest, options={**manifest.options, MIXED: True}).write(tmp_path)
    for name in manifest.files:
        (tmp_path / name).symlink_to(tiny.program / name)
    with pytest.raises(ArtifactError, match="compiled by an older version of QEfficient; compile it again"):
        SlotSession(tmp_path, verify=False)
