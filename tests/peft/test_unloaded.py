# SPDX-License-Identifier: BSD-3-Clause
"""Export straight from the checkpoint, without loading the base."""

from pathlib import Path

import pytest
from peft import IA3Config
from transformers import AutoModelForCausalLM

from QEfficient import QEffAutoPeftModelForCausalLM
from QEfficient.errors import AdapterMismatchError
from QEfficient.peft.unloaded import export_adapters
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
