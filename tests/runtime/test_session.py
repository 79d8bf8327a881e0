# SPDX-License-Identifier: BSD-3-Clause
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from QEfficient.compile.program import compile_graph
from QEfficient.compile.weightfile import WEIGHTS_FILE
from QEfficient.contract import KERNELS, Manifest
from QEfficient.errors import AdapterMismatchError, AdapterNotFoundError, ArtifactError, ConfigError, NotCompiledError
from QEfficient.export.torch_to_onnx import export_graph
from QEfficient.runtime import session as session_module
from QEfficient.runtime.prefill import prefill
from QEfficient.runtime.session import OrtSession

VOCAB = 97

# PyTorch and ONNX Runtime add in different orders; float32 sums of these sizes differ by about 1e-6 of logits near 5.
TOLERANCE = 2e-5


def _rows_of(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, n) for n in lengths]


def step(session, rows, tokens):
    """Append one token to each row and return the logits behind it."""
    positions = np.array([[len(r)] for r in rows])
    logits = session.run(np.asarray(tokens)[:, None], positions)[:, 0]
    return logits, [np.append(r, t) for r, t in zip(rows, tokens, strict=True)]


def _assert_logits(tiny, got, rows, adapter="base"):
    np.testing.assert_allclose(got, tiny.logits(rows, adapter), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("chunk_len", [1, 3, 8, 64])
@pytest.mark.parametrize("lengths", [(5,), (1, 17, 9), (20, 20, 3, 12)], ids=str)
def test_prefill_then_decode(tiny, session, lengths, chunk_len):
    """Rows of different lengths, prefilled in chunks of any length, then decoded, give PyTorch's logits of each row alone."""
    rows = _rows_of(*lengths)
    session.allocate(len(rows), 40)
    _assert_logits(tiny, prefill(session, rows, chunk_len=chunk_len), rows)
    for token in range(4):
        logits, rows = step(session, rows, [token] * len(rows))
        _assert_logits(tiny, logits, rows)


@pytest.mark.parametrize("compiled", [False, True], ids=["graph", "program"])
def test_logits_of_every_position(tiny, tmp_path, compiled):
    """A graph exported with ``logits="all"`` gives PyTorch's logits at every real token, in first and later chunks."""
    graph = export_graph(tiny.model, tmp_path / "all", adapter_name="one", logits="all")
    session = OrtSession(compile_graph(graph) if compiled else graph, threads=1)
    rows = _rows_of(7, 4)
    session.allocate(2, 16)
    first = session.run(np.stack([r[:3] for r in rows]), np.tile(np.arange(3), (2, 1)))
    ids = np.stack([rows[0][3:], np.pad(rows[1][3:], (0, 3))])
    second = session.run(ids, np.array([[3, 4, 5, 6], [3, -1, -1, -1]]))
    for b, row in enumerate(rows):
        got = np.concatenate([first[b], second[b]])[: len(row)]
        _assert_logits(tiny, got, [row[: n + 1] for n in range(len(row))])
    session.reset()
    _assert_logits(tiny, prefill(session, rows, chunk_len=3), rows)


def test_prefill_continues(tiny, session):
    """Prefill behind what the cache holds already, also where a long row leaves no room for a wide chunk."""
    rows, more = _rows_of(30, 4), _rows_of(1, 9, seed=1)
    session.allocate(2, 31)
    prefill(session, rows, chunk_len=8)
    logits = prefill(session, more, chunk_len=8, starts=[30, 4])
    _assert_logits(tiny, logits, [np.append(r, m) for r, m in zip(rows, more, strict=True)])


def test_large_pages_change_no_bit(tiny):
    """Weights on large pages are the same weights."""
    rows = _rows_of(5, 9)
    logits = []
    for large in (False, True):
        session = OrtSession(tiny.program, threads=1, large_pages=large)
        session.allocate(2, 16)
        logits.append(prefill(session, rows, chunk_len=8))
    assert np.array_equal(*logits)


def test_context_may_be_filled_to_the_last_position(tiny, session):
    """A cache of n positions takes n tokens, and says which row does not fit with n + 1."""
    rows = _rows_of(12, 7)
    session.allocate(2, 12)
    _assert_logits(tiny, prefill(session, rows, chunk_len=5), rows)
    with pytest.raises(ConfigError, match="row 0 is at position 12, 1 more make 13, the cache holds 12"):
        step(session, rows, [1, 1])
    with pytest.raises(ConfigError, match="row 1 has 13 tokens from position 0 on, the cache holds 12"):
        prefill(session, _rows_of(2, 13), chunk_len=5)


def test_cache_stays_in_place(session):
    """Calls write the session's own buffers, wherever they were allocated."""
    session.allocate(2, 16)
    before = {name: state.ctypes.data for name, state in session._states.items()}
    prefill(session, _rows_of(3, 5), chunk_len=4)
    assert {name: state.ctypes.data for name, state in session._states.items()} == before
    for state in session._states.values():
        assert np.all(state[0, :, :3] != 0)
        assert np.all(state[:, :, 8:] == 0)


def test_onnxruntime_copies_nothing(tiny):
    """ONNX Runtime warns where it must copy a cache; here it warns of nothing."""
    code = (
        "import sys, numpy as np\n"
        "from QEfficient.runtime.session import OrtSession\n"
        "OrtSession(sys.argv[1])  # what it thinks of the machine it says with the first session\n"
        "print('machine', file=sys.stderr, flush=True)\n"
        "for folder in sys.argv[1:]:\n"
        "    s = OrtSession(folder)\n"
        "    s.allocate(2, 16)\n"
        "    for p in range(3):\n"
        "        s.run(np.ones((2, 1), np.int64), np.full((2, 1), p))\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tiny.graph, tiny.program], capture_output=True, text=True, check=False
    )
    _, known, said = done.stderr.partition("machine\n")
    assert (done.returncode, done.stdout, known, said) == (0, "", "machine\n", ""), done.stderr


def test_reset_empties_the_cache(tiny, session):
    """After reset the cache is zero, and a new prompt gives what it gives in a new session."""
    session.allocate(1, 32)
    prefill(session, _rows_of(20), chunk_len=8)
    session.reset()
    assert all(not state.any() for state in session._states.values())
    rows = _rows_of(6, seed=3)
    _assert_logits(tiny, prefill(session, rows, chunk_len=8), rows)


def test_reorder_copies_rows(tiny, session):
    """After reorder each row continues the row it was given, as beam search needs."""
    rows = _rows_of(4, 9, 6)
    session.allocate(3, 16)
    prefill(session, rows, chunk_len=4)
    session.reorder([1, 2, 1])
    logits, rows = step(session, [rows[1], rows[2], rows[1]], [3, 4, 5])
    _assert_logits(tiny, logits, rows)
    with pytest.raises(ConfigError, match=r"one row in \[0, 3\) for each row"):
        session.reorder([0, 1, 3])


def test_switching_adapters(tiny, session):
    """Each adapter gives its own logits, whatever its rank and scaling, and leaves no trace in the next one or the base."""
    rows = _rows_of(9, 4)
    session.allocate(2, 16)
    for name, tensors in tiny.adapters.items():
        session.load_adapter(name, tensors)
    assert session.adapters == ("one", "two")
    seen = {}
    for name in ("base", "one", "two", "one", "base", "two"):
        session.set_adapter(name)
        assert session.active_adapter == name
        session.reset()
        logits = prefill(session, rows, chunk_len=3)
        _assert_logits(tiny, logits, rows, name)
        np.testing.assert_array_equal(logits, seen.setdefault(name, logits))
    assert np.abs(seen["one"] - seen["base"]).max() > 100 * TOLERANCE
    assert np.abs(seen["one"] - seen["two"]).max() > 100 * TOLERANCE


def test_loaded_adapter_is_a_copy(tiny, session):
    """Changing an array after loading changes nothing; loading the active adapter again takes effect."""
    rows = _rows_of(5)
    tensors = {k: v.copy() for k, v in tiny.adapters["one"].items()}
    session.allocate(1, 16)
    session.load_adapter("mine", tensors)
    session.set_adapter("mine")
    for tensor in tensors.values():
        tensor[...] = 0
    _assert_logits(tiny, prefill(session, rows, chunk_len=8), rows, "one")
    session.load_adapter("mine", tensors)
    _assert_logits(tiny, prefill(session, rows, chunk_len=8), rows, "base")


def test_unloading_the_active_adapter_gives_the_base(tiny, session):
    """An unloaded adapter is gone, and its name is offered no more."""
    session.load_adapter("one", tiny.adapters["one"])
    session.set_adapter("one")
    session.unload_adapter("one")
    assert session.active_adapter == "base"
    with pytest.raises(AdapterNotFoundError, match=r"no adapter 'one' is loaded \(loaded: base\)"):
        session.set_adapter("one")


def _change_name(tensors):
    name = next(n for n in tensors if "lora_A" in n)
    tensors[name.replace("lora_A", "lora_AA")] = tensors.pop(name)


def _change_rank(tensors):
    name = next(n for n in tensors if "layers.1.self_attn.v_proj.lora_A" in n)
    tensors[name] = tensors[name][:3].copy()


def _change_shape(tensors):
    name = next(n for n in tensors if "lora_A" in n)
    tensors[name] = tensors[name][:, :-1].copy()


def _change_type(tensors):
    name = next(n for n in tensors if "lora_B" in n)
    tensors[name] = tensors[name].astype(np.float64)


def _drop_scaling(tensors):
    del tensors[next(n for n in tensors if n.endswith(".scaling"))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_change_name, "the graph has no input .*lora_AA.*did you mean .*lora_A"),
        (_change_rank, "rank is 3 in .*layers.1.self_attn.v_proj.lora_A.weight' and 4 in "),
        (_change_shape, r"lora_A.weight' has shape \(4, 63\), the graph takes \(rank, 64\)"),
        (_change_type, "lora_B.weight' is float64, the graph takes float32"),
        (_drop_scaling, "it has no tensor .*scaling"),
    ],
)
def test_adapter_that_does_not_fit(tiny, session, change, message):
    """An adapter that differs from the manifest is refused by its first difference, and the one of that name stays."""
    rows = _rows_of(5)
    session.allocate(1, 16)
    session.load_adapter("one", tiny.adapters["one"])
    session.set_adapter("one")
    wrong = dict(tiny.adapters["one"])
    change(wrong)
    with pytest.raises(AdapterMismatchError, match=message):
        session.load_adapter("one", wrong)
    _assert_logits(tiny, prefill(session, rows, chunk_len=8), rows, "one")


def test_wrong_calls(session):
    """Calls that break the contract are refused with the values that do."""
    ids = np.zeros((2, 3), np.int64)
    with pytest.raises(NotCompiledError, match="call allocate"):
        session.run(ids, np.arange(3)[None].repeat(2, 0))
    session.allocate(2, 8)
    with pytest.raises(ConfigError, match=r"must both be \(2, S\), not \(1, 3\)"):
        session.run(ids[:1], ids[:1])
    with pytest.raises(ConfigError, match="row 1 has no real token"):
        session.run(ids, np.array([[0, 1, 2], [-1, -1, -1]]))
    with pytest.raises(ConfigError, match=r"token ids must be in \[0, 97\), not 0 to 97"):
        session.run(ids + np.array([0, 0, 97]), np.arange(3)[None].repeat(2, 0))
    with pytest.raises(ConfigError, match="row 0 is empty"):
        prefill(session, [ids[0][:0], ids[0]], chunk_len=2)
    with pytest.raises(ConfigError, match="names the base"):
        session.load_adapter("base", {})


def test_context_that_does_not_fit(session, monkeypatch):
    """A context longer than the base's, or a cache larger than memory, is refused with both numbers."""
    with pytest.raises(ConfigError, match=r"ctx_len is 65, but the longest context of .* is 64"):
        session.allocate(1, 65)
    monkeypatch.setattr(session_module.psutil, "virtual_memory", lambda: type("M", (), {"available": 3 * 2**20}))
    with pytest.raises(ConfigError, match="batch_size 1024 by ctx_len 64 takes 32 MiB, 3 MiB of memory are available"):
        session.allocate(1024, 64)


def test_memory(tiny, session):
    """Memory is told by part: two layers of keys and values, 2 heads of 16, in float32; every resident adapter."""
    session.allocate(3, 32)
    before = session.memory_bytes()
    assert before["cache"] == 2 * 2 * 3 * 2 * 32 * 16 * 4
    session.load_adapter("one", tiny.adapters["one"])
    bound = {s.name for s in session.manifest.adapter if s.bound}
    added = session.memory_bytes()["adapters"] - before["adapters"]
    assert added == sum(t.nbytes for n, t in tiny.adapters["one"].items() if n in bound)
    weights = sum(p.numel() for n, p in tiny.model.named_parameters() if "lora" not in n) * 4
    assert weights < before["weights"] < weights + 200_000


def test_damaged_graph(tiny, tmp_path: Path):
    """A folder that is no graph, or whose files changed, is refused before ONNX Runtime sees it."""
    with pytest.raises(ArtifactError, match="is not an exported graph"):
        OrtSession(tmp_path)
    for file in (f for f in tiny.graph.iterdir() if f.is_file()):
        shutil.copyfile(file, tmp_path / file.name)
    with (tmp_path / "model.onnx").open("r+b") as f:
        f.truncate(1000)
    with pytest.raises(ArtifactError, match=r"model\.onnx has 1000 bytes"):
        OrtSession(tmp_path)
    with pytest.raises(ArtifactError, match="ONNX Runtime cannot load"):
        OrtSession(tmp_path, verify=False)


def test_large_pages_take_weights_out_of_the_file(tiny, tmp_path):
    """Kernels of our own read weights where the file is mapped; for large pages they are in memory, and give the same."""
    program = compile_graph(tiny.graph, precision="int4", out=tmp_path)
    if KERNELS not in Manifest.read(program).options:
        pytest.skip("this machine has no kernels")
    ids, positions = np.arange(6)[None], np.arange(6)[None]
    logits, mapped = [], []
    for large_pages in (True, False):
        session = OrtSession(program, threads=1, large_pages=large_pages)
        session.allocate(1, 8)
        logits.append(session.run(ids, positions))
        mapped.append(str(program.resolve() / WEIGHTS_FILE) in Path("/proc/self/maps").read_text())
    assert mapped == [False, True]
    np.testing.assert_array_equal(*logits)
