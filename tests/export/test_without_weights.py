# SPDX-License-Identifier: BSD-3-Clause
"""Where weights lie: linked, written beside the graph, or not there at all."""

import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from peft import IA3Config
from transformers import AutoModelForCausalLM

from QEfficient.cloud.__main__ import main
from QEfficient.compile.program import compile_graph
from QEfficient.contract import Manifest
from QEfficient.errors import ArtifactError, UnsupportedError
from QEfficient.export.torch_to_onnx import is_whole
from QEfficient.peft.unloaded import export_adapters
from QEfficient.runtime.session import OrtSession
from tests.export.test_torch_to_onnx import TOLERANCE, worst
from tests.tiny import make_base, make_peft, save_adapter

SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A bfloat16 base in three shards."""
    folder = tmp_path / "base"
    make_base("llama").to(torch.bfloat16).save_pretrained(folder, max_shard_size="60KB")
    assert (folder / SHARD).is_file(), sorted(p.name for p in folder.iterdir())
    return folder


def peft_model(base: Path) -> object:
    """Return the base, widened to float32 as it is run, with the adapter of :func:`save_adapter`."""
    return make_peft(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), name="a")


def test_a_forgotten_shard_is_an_error(sharded: Path, tmp_path: Path) -> None:
    """Without being asked for it, nothing is exported of a checkpoint that is not all there."""
    adapter = save_adapter(sharded, tmp_path / "a")
    (sharded / SHARD).unlink()
    with pytest.raises(ArtifactError, match=rf"{SHARD} is missing.*--without-weights"):
        export_adapters(sharded, {"a": adapter}, tmp_path / "graph")
    assert not list(tmp_path.glob("graph*"))


def test_graph_from_config_and_index(sharded: Path, tmp_path: Path) -> None:
    """The graph is the whole one but for where its weights lie; it says so, and nothing runs or compiles it."""
    adapter = save_adapter(sharded, tmp_path / "a")
    whole = export_adapters(sharded, {"a": adapter}, tmp_path / "graph")
    for shard in sharded.glob("*.safetensors"):
        shard.unlink()
    folder = export_adapters(sharded, {"a": adapter}, tmp_path / "graph", weights="absent")
    assert folder != whole
    manifest = Manifest.read(folder)
    assert SHARD in manifest.absent
    assert (folder / "adapters" / "a.safetensors").is_file()
    ours, theirs = (onnx.load(f / "model.onnx", load_external_data=False).graph for f in (folder, whole))
    assert [n.SerializeToString() for n in ours.node] == [n.SerializeToString() for n in theirs.node]
    assert [(i.name, i.data_type, list(i.dims)) for i in ours.initializer] == [
        (i.name, i.data_type, list(i.dims)) for i in theirs.initializer
    ]
    missing = r"has no weights.*without model-00001-of-00003\.safetensors \(and 2 more\).*export again"
    with pytest.raises(ArtifactError, match=missing):
        OrtSession(folder)
    with pytest.raises(ArtifactError, match=missing):
        OrtSession(folder, verify=False)
    with pytest.raises(ArtifactError, match=missing):
        compile_graph(folder)
    assert main(["test", str(sharded), "--adapter", f"a={adapter}", "--graph", str(folder)]) == 2
    with pytest.raises(Exception, match=r"model-0000\d-of-00003"):
        onnxruntime.InferenceSession(folder / "model.onnx")


@pytest.mark.slow
def test_the_index_is_its_identity(sharded: Path, tmp_path: Path) -> None:
    """The same index finds the same graph; another index is another one."""
    adapter = save_adapter(sharded, tmp_path / "a")
    made = [export_adapters(sharded, {"a": adapter}, tmp_path / "graph", weights="absent") for _ in range(2)]
    assert made[0] == made[1]
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))
    assert export_adapters(sharded, {"a": adapter}, tmp_path / "graph", weights="absent") != made[0]
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match=r"lack 'model\.norm\.weight'"):
        export_adapters(sharded, {"a": adapter}, tmp_path / "graph", weights="absent")


def test_what_needs_the_weights_says_so(sharded: Path, tmp_path: Path) -> None:
    """A method whose neutral values are computed from the weights is refused, and so is a base without an index."""
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    adapter = save_adapter(sharded, tmp_path / "a", config=config)
    with pytest.raises(UnsupportedError, match=r"no graph without weights .* computed from its weights"):
        export_adapters(sharded, {"a": adapter}, tmp_path / "graph", weights="absent")
    plain = save_adapter(sharded, tmp_path / "b")
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(UnsupportedError, match=r"has no model\.safetensors\.index\.json"):
        export_adapters(sharded, {"a": plain}, tmp_path / "graph", weights="absent")


def test_standalone_folder(sharded: Path, tmp_path: Path) -> None:
    """A standalone graph is right without its base, and the full checker reads it where it stands."""
    adapter = save_adapter(sharded, tmp_path / "a")
    model = peft_model(sharded)
    argv = ["export", str(sharded), "--adapter", f"a={adapter}", "--output", str(tmp_path / "graph"), "--standalone"]
    assert main(argv) == 0
    (folder,) = tmp_path.glob("graph-*")
    assert all(p.stat().st_nlink == 1 for p in folder.iterdir() if p.is_file())
    for file in sharded.iterdir():
        file.unlink()
    assert is_whole(folder)
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    assert worst(model, "a", folder) < TOLERANCE  # type: ignore[arg-type]
    assert main([*argv, "--without-weights"]) == 2
