# SPDX-License-Identifier: BSD-3-Clause
import json
import shutil

import numpy as np
import pytest

from QEfficient.compile import targets
from QEfficient.compile.program import compile_graph, default_block_size
from QEfficient.contract import MODEL_FILE, Manifest
from QEfficient.errors import ArtifactError, ConfigError, UnsupportedError
from QEfficient.runtime.session import OrtSession

TOLERANCE = 5e-5  # as for the passes


@pytest.fixture
def graph(exported, tmp_path):
    """Return a copy of the tiny Llama's graph folder."""
    source = exported("llama").graph
    target = tmp_path / "graph"
    target.mkdir()
    for file in (f for f in source.iterdir() if f.is_file()):
        shutil.copy2(file, target / file.name)
    return target


@pytest.fixture
def lowered(monkeypatch):
    """Return the list of precisions that the target was asked to lower to: one for each real compilation."""
    calls = []
    lower = targets.OnnxRuntime.lower

    def counted(self, graph, manifest, precision, folder, **options):
        calls.append(precision.name)
        return lower(self, graph, manifest, precision, folder, **options)

    monkeypatch.setattr(targets.OnnxRuntime, "lower", counted)
    return calls


def test_layout(graph):
    """The program keeps the graph folder's contract, its weights are the graph's own files, the options stand beside it."""
    program = compile_graph(graph, batch_size=2, prefill_seq_len=16, ctx_len=64)
    assert program.name == "program"
    assert program.parent.parent == graph
    assert program.parent.name.startswith("qpc-")
    config = json.loads((program.parent / "qconfig.json").read_text())
    options = {"batch_size": 2, "prefill_seq_len": 16, "ctx_len": 64, "precision": "fp32", "target": "onnxruntime"}
    assert options.items() <= config.items()
    manifest, source = Manifest.read(program), Manifest.read(graph)
    assert options.items() <= manifest.options.items()
    assert manifest.options["graph"] == source.hash
    assert set(manifest.files) == {*source.files, "program.safetensors"}
    for name in set(source.files) - {MODEL_FILE}:
        assert (program / name).samefile(graph / name)


def test_same_logits(exported, graph, trace):
    """The program gives the graph's logits, with the adapter as with the base."""
    results = []
    for folder in (graph, compile_graph(graph)):
        session = OrtSession(folder, threads=1)
        session.load_adapter("a", exported("llama").adapter)
        base = trace(session)
        session.set_adapter("a")
        results.append(base + trace(session))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)


def test_compiled_once(graph, lowered):
    """The same options give the same folder without work; other options another one."""
    first = compile_graph(graph, ctx_len=64)
    assert compile_graph(graph, ctx_len=64) == first
    assert lowered == ["fp32"]
    assert compile_graph(graph, ctx_len=32) != first
    assert lowered == ["fp32", "fp32"]


def test_another_machine_compiles_anew(graph, lowered, monkeypatch):
    """A program is tied to the instruction set that it was compiled on."""
    first = compile_graph(graph)
    monkeypatch.setattr(targets, "instruction_set", lambda: "another")
    assert compile_graph(graph) != first
    assert len(lowered) == 2


def test_elsewhere(graph, tmp_path):
    """``out`` takes the program's folder."""
    program = compile_graph(graph, out=tmp_path / "programs")
    assert program.parent.parent == tmp_path / "programs"
    OrtSession(program)


def test_failure_leaves_nothing(graph, monkeypatch):
    """If lowering fails, no folder is left behind."""

    def fail(*_, **__):
        raise UnsupportedError("no")

    monkeypatch.setattr(targets.OnnxRuntime, "lower", fail)
    before = sorted(p.name for p in graph.iterdir())
    with pytest.raises(UnsupportedError, match="no"):
        compile_graph(graph)
    assert sorted(p.name for p in graph.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": "onxruntime"}, ConfigError, r"unknown target 'onxruntime'; did you mean 'onnxruntime'\?"),
        (
            {"precision": "int5"},
            UnsupportedError,
            r"has no precision 'int5'; did you mean 'int8'\? \(it has: fp32, bf16, int8, int4\)",
        ),
        (
            {"precision": "bf16", "target": "onnxruntime-plain"},
            UnsupportedError,
            "ONNX Runtime has no bfloat16 matrix product for CPUs",
        ),
        (
            {"precision": "int4", "block_size": 48},
            ConfigError,
            "block_size must be one of 16, 32, 64, 128, 256, not 48",
        ),
        ({"keep": ["lm_head*"]}, ConfigError, r"keep 'lm_head\*': precision fp32 has nothing to keep from"),
        ({"ctx_len": 300}, ConfigError, "ctx_len is 300, but the base's longest context is 256"),
        ({"prefill_seq_len": 0}, ConfigError, "prefill_seq_len must be at least 1, not 0"),
        ({"batch_size": -1}, ConfigError, "batch_size must be at least 1, not -1"),
    ],
)
def test_wrong_options(graph, options, error, message):
    """Options that cannot be are refused with what could be."""
    with pytest.raises(error, match=message):
        compile_graph(graph, **options)


@pytest.mark.parametrize(
    ("precision", "hidden", "size"),
    [
        ("int4", 896, 32),
        ("int8", 896, 128),
        ("int8", 576, 64),
        ("int8", 100, 32),
        ("int8", None, 32),
        ("fp32", 896, 32),
    ],
)
def test_block_size_unless_chosen(precision, hidden, size):
    """8 bits take the largest blocks that fill the rows of the embedding."""
    assert default_block_size(precision, {"config": {"hidden_size": hidden}}) == size


def test_the_block_size_is_recorded(graph):
    """What was chosen for somebody is in the manifest as if they had, and makes the same program."""
    program = compile_graph(graph, precision="int8")
    assert Manifest.read(program).options["block_size"] == 64  # as long as a row of the embedding
    assert compile_graph(graph, precision="int8", block_size=64) == program


def test_damaged_files(graph, tmp_path):
    """A graph or a program whose files changed is refused; ``verify=False`` compiles the graph as it is, apart."""
    program = compile_graph(graph)
    with pytest.raises(ArtifactError, match="is not an exported graph"):
        compile_graph(tmp_path)
    content = (program / MODEL_FILE).read_bytes()
    (program / MODEL_FILE).write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=r"Remove .*qpc-\w+ to compile again"):
        compile_graph(graph)
    (program / MODEL_FILE).write_bytes(content)
    with (graph / MODEL_FILE).open("ab") as f:
        f.write(b"\x72\x00")  # an empty metadata entry: another file, the same graph
    with pytest.raises(ArtifactError, match="export again"):
        compile_graph(graph)
    assert compile_graph(graph, verify=False) != program
