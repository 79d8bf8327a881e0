# SPDX-License-Identifier: BSD-3-Clause
"""Export straight from the checkpoint, without loading the base."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import IA3Config, PeftModel, PolyConfig
from transformers import AutoModelForCausalLM

from QEfficient import QEffAutoPeftModelForCausalLM
from QEfficient.cloud.__main__ import main
from QEfficient.errors import AdapterMismatchError
from QEfficient.peft.adapters import Adapter, fit, read_exported
from QEfficient.peft.tasks import choose_task
from QEfficient.peft.unloaded import export_adapters
from QEfficient.runtime.session import OrtSession
from tests.tiny import STYLES, lora, save_adapter, save_base


@pytest.mark.parametrize("style", ["qwen2", "gpt2"])
def test_same_graph_without_loading(style: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph, and the adapters beside it, are those of a loaded model; no weight is read into one."""
    base = save_base(tmp_path / "base", style)
    adapters = {"a": save_adapter(base, tmp_path / "a"), "b": save_adapter(base, tmp_path / "b", config=lora(r=9))}
    loaded = QEffAutoPeftModelForCausalLM.from_base(base, adapters).export(tmp_path / "loaded").parent

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    folder = export_adapters(base, adapters, tmp_path / "unloaded")
    assert folder.name.removeprefix("unloaded") == loaded.name.removeprefix("loaded")
    for file in ("model.onnx", "adapters/a.safetensors", "adapters/b.safetensors"):
        assert (folder / file).read_bytes() == (loaded / file).read_bytes()
    assert (folder / "weights-00001.safetensors").samefile(base / "model.safetensors")


def test_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    """Shapes are held against the base's modules though no weight is loaded."""
    base = save_base(tmp_path / "base")
    wide = save_base(tmp_path / "wide", STYLES["llama"].__class__(**{**STYLES["llama"].to_dict(), "hidden_size": 128}))
    with pytest.raises(
        AdapterMismatchError, match=r"'a' does not fit the base: its file has \[128, 4\].*takes \[64, 4\]"
    ):
        export_adapters(base, {"a": save_adapter(wide, tmp_path / "a")}, tmp_path / "graph")


def test_methods_that_need_the_base_load_it(tmp_path: Path) -> None:
    """What an adapter's file does not say (the values that leave the base alone) comes from the loaded base."""
    base = save_base(tmp_path / "base")
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    folder = export_adapters(base, {"a": save_adapter(base, tmp_path / "a", config=config)}, tmp_path / "graph")
    assert (folder / "neutral.safetensors").is_file()


def test_weights_of_the_base_beside_the_adapter(tmp_path: Path) -> None:
    """PEFT saves ``lm_head`` itself with LoRA on it; that is not taken for a tensor of another base."""
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "a", config=lora(target_modules=["q_proj", "lm_head"]))
    assert any(".base_layer." in name for name in Adapter.load(adapter, "a").tensors)
    folder = export_adapters(base, {"a": adapter}, tmp_path / "graph")
    assert "base_model.model.lm_head.lora_A.weight" in read_exported(folder / "adapters" / "a.safetensors").tensors


def test_a_task_is_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--task`` takes that task's tensors; a number that the adapter has not, and a name that was not given, are refused."""
    base = save_base(tmp_path / "base")
    config = PolyConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, n_tasks=3, n_skills=2)
    adapter = save_adapter(base, tmp_path / "x", config=config)
    argv = ["export", str(base), "--adapter", f"x={adapter}", "--output", str(tmp_path / "graph")]
    assert main([*argv, "--task", "x=2"]) == 0
    (folder,) = tmp_path.glob("graph-*")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter), adapter_name="x")
    choose_task(model, "x", 2)
    got, want = read_exported(folder / "adapters" / "x.safetensors"), Adapter.from_model(model, "x")
    assert got.tensors.keys() == want.tensors.keys()
    assert all(np.array_equal(got.tensors[name], array) for name, array in want.tensors.items())
    assert main([*argv, "--task", "x=3"]) == 2
    assert "has 3 task(s), numbered from 0; there is no task 3" in capsys.readouterr().err
    assert main([*argv, "--task", "y=1"]) == 2
    assert "--task takes NAME=N, a number for one of x, not 'y=1'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_adapters_that_change_the_base(kind: str, tmp_path: Path) -> None:
    """PEFT takes such an adapter's first factors off the base: the graph is of that base, and of that adapter alone."""
    base = save_base(tmp_path / "base")
    mover = save_adapter(base, tmp_path / "mover", config=lora(init_lora_weights=kind))
    plain = save_adapter(base, tmp_path / "plain")
    ids = np.arange(3, 15)[None]
    with torch.no_grad():
        peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(mover)).eval()
        want = peft_model(torch.from_numpy(ids)).logits[0, -1].numpy()
    folder = export_adapters(base, {"mover": mover}, tmp_path / "graph")
    session = OrtSession(folder, threads=1)
    session.load_adapter("mover", fit(read_exported(folder / "adapters/mover.safetensors"), session.manifest))
    session.allocate(1, 16)
    session.set_adapter("mover")
    assert np.abs(session.run(ids, np.arange(12)[None])[0, -1] - want).max() < 1e-4 * np.ptp(want)

    exported = export_adapters(base, {"plain": plain}, tmp_path / "plain_graph")
    beside = read_exported(exported / "adapters/plain.safetensors")
    with pytest.raises(AdapterMismatchError, match=f"init_lora_weights is None, exported with '{kind}'"):
        fit(beside, session.manifest)
    with pytest.raises(
        AdapterMismatchError, match=r"'mover' changes the base's weights .* shares the base with no other"
    ):
        export_adapters(base, {"plain": plain, "mover": mover}, tmp_path / "both")
