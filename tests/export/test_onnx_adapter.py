# SPDX-License-Identifier: BSD-3-Clause
"""``--adapter-format onnx_adapter``: plain ONNX Runtime runs graph and adapters; nothing of ours takes part."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from peft import PeftModel, PromptTuningConfig
from transformers import AutoModelForCausalLM

from QEfficient.cloud.__main__ import main
from tests.tiny import lora, make_base, save_adapter, save_base

IDS = torch.tensor([[3, 14, 15, 92, 6]])


def run(session: onnxruntime.InferenceSession, adapter: Path | None) -> np.ndarray:
    """Return the last token's logits, by ONNX Runtime's own adapters."""
    options = onnxruntime.RunOptions()
    if adapter is not None:
        loaded = onnxruntime.LoraAdapter()
        loaded.Load(str(adapter))
        options.add_active_adapter(loaded)
    sizes = {"batch_size": 1, "ctx_len": 8, "seq_len": IDS.shape[1]}
    feeds = {i.name: np.zeros([sizes.get(d, d) for d in i.shape], np.float32) for i in session.get_inputs()}
    feeds |= {"input_ids": IDS.numpy(), "position_ids": np.arange(IDS.shape[1])[None]}
    return session.run(["logits"], feeds, options)[0][0, -1]  # type: ignore[no-any-return]


def test_plain_onnxruntime_runs_graph_and_adapters(tmp_path: Path) -> None:
    """Two adapters of other rank and scaling, and no adapter, each give PyTorch's logits."""
    base = save_base(tmp_path / "base")
    adapters = {
        "x": save_adapter(base, tmp_path / "x"),
        "y": save_adapter(base, tmp_path / "y", seed=5, config=lora(r=2, lora_alpha=32, target_modules=["q_proj"])),
    }
    named = [f"--adapter={name}={path}" for name, path in adapters.items()]
    argv = ["export", str(base), *named, "--output", str(tmp_path / "graph"), "--adapter-format", "onnx_adapter"]
    assert main([*argv, "--standalone"]) == 0  # the checker refuses to look at hard links
    (folder,) = tmp_path.glob("graph-*")
    onnx.checker.check_model(str(folder / "model_onnx_adapter.onnx"), full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(folder / "model_onnx_adapter.onnx", options)
    wanted = {None: make_base("llama")}
    for name, path in adapters.items():
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(path))
        wanted[name] = loaded.eval()  # type: ignore[index, assignment]
    for name, model in wanted.items():
        got = run(session, folder / "adapters" / f"{name}.onnx_adapter" if name else None)
        with torch.no_grad():
            want = model(input_ids=IDS).logits[0, -1].numpy()
        assert np.abs(got - want).max() < 1e-4 * np.ptp(want), name


def test_virtual_tokens_have_no_place_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An adapter that is no input of the graph is refused with the reason."""
    base = save_base(tmp_path / "base")
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapter = save_adapter(base, tmp_path / "p", config=config)
    argv = ["export", str(base), "--adapter", f"p={adapter}", "--output", str(tmp_path / "graph")]
    assert main([*argv, "--adapter-format", "onnx_adapter"]) == 2
    assert "'p' (PROMPT_TUNING) brings virtual tokens" in capsys.readouterr().err
