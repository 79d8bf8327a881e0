# SPDX-License-Identifier: BSD-3-Clause
"""Exported graphs against PyTorch, and what decides which graph is whose."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config

from QEfficient.contract import Manifest
from QEfficient.errors import ConfigError
from QEfficient.export.torch_to_onnx import export_graph
from QEfficient.export.weights import Checkpoint
from QEfficient.peft.adapters import Adapter, fit, neutral_tensors
from tests.tiny import STYLES, VOCAB, lora, make_base, make_peft, perturb, save_base

# float32 kernels of PyTorch and ONNX Runtime sum in different orders: seen 1e-6 of the logits' range; 1e-4 leaves room.
TOLERANCE = 1e-4
LENGTHS = (13, 9, 4)


def run_graph(
    folder: Path, tensors: dict[str, Any], rows: list[torch.Tensor], chunk: int
) -> list[tuple[int, int, np.ndarray]]:
    """Run ragged rows through a graph in chunks, by the contract; return ``(row, position, logits)``."""
    manifest = Manifest.read(folder)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    names = [o.name for o in session.get_outputs()]
    sizes = {"batch_size": len(rows), "ctx_len": 24}
    state = {s.name: np.zeros([sizes.get(d, d) for d in s.shape], s.dtype) for s in manifest.states}  # type: ignore[call-overload]
    seen = []
    for start in range(0, max(map(len, rows)), chunk):
        width = min(chunk, max(map(len, rows)) - start)
        ids, positions = np.zeros((len(rows), width), np.int64), np.full((len(rows), width), -1)
        for b, row in enumerate(rows):
            first = start if start < len(row) else len(row) - 1
            part = row[first : first + width].numpy()
            ids[b, : len(part)], positions[b, : len(part)] = part, np.arange(first, first + len(part))
        out = session.run(None, {"input_ids": ids, "position_ids": positions, **state, **tensors})
        made = dict(zip(names, out, strict=True))
        state = {name: made[f"{name}_RetainedState"] for name in state}
        for b in range(len(rows)):
            last = int(positions[b].max())
            seen.append((b, last, made["logits"][b, -1 if manifest.logits == "last" else last - positions[b, 0]]))
    return seen


def worst(model: PeftModel, name: str, folder: Path, chunk: int = 6) -> float:
    """Return the largest difference of logits from PyTorch, relative to their range."""
    torch.manual_seed(3)
    rows = [torch.randint(3, VOCAB, (length,)) for length in LENGTHS]
    model.set_adapter(name)
    with torch.no_grad():
        want = [model(input_ids=row[None]).logits[0].float().numpy() for row in rows]
    tensors = fit(Adapter.from_model(model, name), Manifest.read(folder), neutral_tensors(folder))
    span = float(want[0].max() - want[0].min())
    return max(np.abs(got - want[b][at]).max() for b, at, got in run_graph(folder, tensors, rows, chunk)) / span


@pytest.mark.parametrize("style", STYLES)
def test_logits_equal_pytorch(style: str, tmp_path: Path) -> None:
    """Chunked prefill of ragged rows, and tokens one by one, agree with PyTorch on every style, for two adapters."""
    model = make_peft(make_base(style), name="a")
    model.add_adapter("b", lora(r=2, lora_alpha=32))
    perturb(model, "b", seed=5)
    folder = export_graph(model, tmp_path / "graph", adapter_name="a")
    assert worst(model, "a", folder) < TOLERANCE
    assert worst(model, "b", folder) < TOLERANCE
    assert worst(model, "a", folder, chunk=1) < TOLERANCE


def test_layers_that_scale_attention_apart(tmp_path: Path) -> None:
    """Layers that differ in a number only, the scale of attention, are not stamped from one another."""
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=2, n_positions=64, scale_attn_by_inverse_layer_idx=True
    )
    config.initializer_range = 0.3
    model = make_peft(make_base(config), name="a", config=lora(target_modules=["c_attn"]))
    folder = export_graph(model, tmp_path / "graph", adapter_name="a")
    assert worst(model, "a", folder) < TOLERANCE


def test_logits_of_every_position(tmp_path: Path) -> None:
    """With ``logits="all"`` the graph returns ``(B, S, V)``, each position PyTorch's."""
    model = make_peft(make_base("llama"), name="a")
    folder = export_graph(model, tmp_path / "graph", adapter_name="a", logits="all")
    assert Manifest.read(folder).logits == "all"
    assert worst(model, "a", folder, chunk=5) < TOLERANCE
    with pytest.raises(ConfigError, match="logits must be one of last, all, not 'some'"):
        export_graph(model, tmp_path / "graph", adapter_name="a", logits="some")


def test_weights_stay_in_the_checkpoint(tmp_path: Path) -> None:
    """Weights that a checkpoint holds are linked, not written; what differs from it is written."""
    base = save_base(tmp_path / "base", "qwen2")
    model = make_peft(AutoModelForCausalLM.from_pretrained(base), name="a")
    folder = export_graph(model, tmp_path / "graph", adapter_name="a", checkpoint=Checkpoint(base))
    assert (folder / "weights-00001.safetensors").samefile(base / "model.safetensors")
    assert worst(model, "a", folder) < TOLERANCE
    with torch.no_grad():
        model.base_model.model.model.norm.weight.mul_(2)
    other = export_graph(model, tmp_path / "graph", adapter_name="a", checkpoint=Checkpoint(base))
    assert other != folder
    assert not (other / "weights-00001.safetensors").exists()
    assert worst(model, "a", other) < TOLERANCE


def test_graph_is_standard_checked_and_readable(tmp_path: Path) -> None:
    """The full checker passes, all operators are ONNX's own, and names follow the module tree."""
    folder = export_graph(make_peft(make_base("llama"), name="a"), tmp_path / "graph", adapter_name="a")
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    assert {n.domain for n in graph.node} == {""}
    names = [n.name for n in graph.node]
    assert len(set(names)) == len(names)
    for name in (
        "model.layers.0.self_attn/Attention",
        "model.layers.1.self_attn/Attention",
        "model.layers.1.mlp.up_proj.base_layer/MatMul",
    ):
        assert name in names
    shapes = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.input}
    assert shapes["input_ids"] == ["batch_size", "seq_len"]
    assert shapes["past_key.1"] == ["batch_size", 2, "ctx_len", 16]
    assert shapes["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"] == ["rank", 64]
    assert shapes["base_model.model.model.layers.1.mlp.up_proj.scaling"] == []


def test_stamped_layers_equal_traced_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph whose layers were stamped from one computes what a graph with every layer traced computes."""
    config = STYLES["llama"].__class__(**{**STYLES["llama"].to_dict(), "num_hidden_layers": 4})
    model = make_peft(make_base(config), name="a")
    stamped = export_graph(model, tmp_path / "stamped", adapter_name="a")
    monkeypatch.setattr("QEfficient.export.program.find_layers", lambda inner: [])
    traced = export_graph(model, tmp_path / "traced", adapter_name="a")
    assert [s.name for s in Manifest.read(stamped).states] == [s.name for s in Manifest.read(traced).states]
    assert Manifest.read(stamped).adapter == Manifest.read(traced).adapter
    assert worst(model, "a", stamped) < TOLERANCE
    assert worst(model, "a", traced) < TOLERANCE


# -- which graph is whose


def hash_of(model: PeftModel, folder: Path, name: str = "a") -> str:
    """Export and return the graph's hash."""
    return Manifest.read(export_graph(model, folder / "graph", adapter_name=name)).hash


def test_other_adapters_are_no_part_of_the_graph(tmp_path: Path) -> None:
    """A model with another adapter loaded exports the same graph."""
    first = hash_of(make_peft(make_base("llama"), name="a"), tmp_path)
    model = make_peft(make_base("llama"), name="a")
    model.add_adapter("more", lora(r=2, target_modules=["q_proj"]))
    assert hash_of(model, tmp_path) == first


@pytest.mark.parametrize("what", ["weights", "config", "targets", "method"])
def test_what_shapes_the_graph_makes_another(what: str, tmp_path: Path) -> None:
    """Base weights, base configuration, targets and method each make another graph."""
    config, seed, adapter = STYLES["llama"], 0, lora()
    if what == "config":
        config = config.__class__(**{**config.to_dict(), "rms_norm_eps": 1e-3})
    elif what == "weights":
        seed = 1
    else:
        adapter = lora(target_modules=["q_proj"]) if what == "targets" else lora(use_dora=True)
    first = hash_of(make_peft(make_base("llama"), name="a"), tmp_path)
    assert hash_of(make_peft(make_base(config, seed=seed), config=adapter, name="a"), tmp_path) != first


def test_damaged_graph_is_made_again(tmp_path: Path) -> None:
    """A truncated file in the cache is noticed, and the next export replaces it."""
    model = make_peft(make_base("llama"), name="a")
    folder = export_graph(model, tmp_path / "graph", adapter_name="a")
    file = folder / "model.onnx"
    file.write_bytes(file.read_bytes()[:-50])
    assert export_graph(model, tmp_path / "graph", adapter_name="a") == folder
    assert worst(model, "a", folder) < TOLERANCE


def test_concurrent_exports_agree(tmp_path: Path) -> None:
    """Two processes that export the same thing at once both end with the same whole graph."""
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.tiny import make_base, make_peft\n"
        "from QEfficient.export.torch_to_onnx import export_graph\n"
        "print(export_graph(make_peft(make_base('llama'), name='a'), Path(sys.argv[1]), adapter_name='a'))\n"
    )
    argv = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "graph")]
    here = Path(__file__).parents[2]
    running = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=here) for _ in range(2)]
    folders = {process.communicate()[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(folders) == 1
    assert worst(make_peft(make_base("llama"), name="a"), "a", Path(folders.pop())) < TOLERANCE
    assert not list(tmp_path.glob(".tmp-*"))
