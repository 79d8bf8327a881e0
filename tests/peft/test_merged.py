# SPDX-License-Identifier: BSD-3-Clause
"""``--merge``: one adapter in the weights, held against PyTorch's merged model and against the unmerged graph."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LilyConfig, LoHaConfig, PeftConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from QEfficient.cloud.__main__ import main
from QEfficient.contract import Manifest
from QEfficient.errors import UnsupportedError
from QEfficient.peft.merged import merge
from QEfficient.peft.unloaded import export_adapters
from QEfficient.runtime.session import OrtSession
from tests.export.test_torch_to_onnx import TOLERANCE
from tests.tiny import lora, make_base, perturb, save_adapter, save_base

ROW = np.array([[3, 14, 15, 92, 6]])


def logits(folder: Path, adapter: str | None = None) -> np.ndarray:
    """Return the last token's logits of a graph."""
    session = OrtSession(folder, threads=1)
    if adapter is not None:
        from QEfficient.peft.adapters import fit, neutral_tensors, read_exported

        read = read_exported(folder / "adapters" / f"{adapter}.safetensors")
        session.load_adapter(adapter, fit(read, session.manifest, neutral_tensors(folder)))
        session.set_adapter(adapter)
    session.allocate(1, 8)
    return session.run(ROW, np.arange(ROW.shape[1])[None])[0, -1]  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["lora", *(pytest.param(m, marks=pytest.mark.slow) for m in ("dora", "loha"))])
def test_merged_graph_is_pytorch_s_merged_model(method: str, tmp_path: Path) -> None:
    """Its logits are those of ``merge_and_unload`` and of the graph with the adapter as input; it has no adapter input."""
    config: PeftConfig = {
        "lora": lora(modules_to_save=["lm_head"]),
        "dora": lora(use_dora=True),
        "loha": LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"], r=4),
    }[method]
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "x", config=config)
    argv = ["export", str(base), "--adapter", f"x={adapter}", "--output", str(tmp_path / "merged"), "--merge", "x"]
    assert main(argv) == 0
    (folder,) = tmp_path.glob("merged-*")
    assert Manifest.read(folder).adapter == ()
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).merge_and_unload()
    with torch.no_grad():
        want = merged.eval()(input_ids=torch.tensor(ROW)).logits[0, -1].numpy()
    got = logits(folder)
    assert np.abs(got - want).max() < TOLERANCE * np.ptp(want)
    unmerged = export_adapters(base, {"x": adapter}, tmp_path / "graph")
    assert np.abs(got - logits(unmerged, "x")).max() < TOLERANCE * np.ptp(want)
    assert np.abs(got - logits(unmerged)).max() > 100 * TOLERANCE * np.ptp(want)


@pytest.mark.parametrize(
    ("style", "config", "reason"),
    [
        (
            "llama",
            PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
            "PROMPT_TUNING bring virtual tokens",
        ),
        ("llama", LilyConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4), "PEFT cannot merge .* LILY"),
        ("llama", lora(alora_invocation_tokens=[5]), "PEFT cannot merge|logits differ by"),
        ("qwen2", lora(target_modules=["embed_tokens"]), "cannot be merged: the merged model's logits differ by"),
    ],
    ids=["prompt", "lily", "alora", "tied"],
)
def test_what_cannot_be_merged_is_refused(style: str, config: PeftConfig, reason: str) -> None:
    """What PEFT does not merge, or merges into something else, is refused with the reason."""
    model = get_peft_model(make_base(style), copy.deepcopy(config), adapter_name="x")
    perturb(model, "x", seed=1)
    with pytest.raises(UnsupportedError, match=reason):
        merge(model.eval(), "x")


def test_merging_is_of_one_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another adapter beside it, or a name that is not given, is refused before any work."""
    argv = ["export", str(tmp_path), "--adapter", "x=X", "--adapter", "y=Y", "--merge", "x"]
    assert main(argv) == 2
    assert "--merge x needs --adapter x=PATH, and no other adapter" in capsys.readouterr().err
    argv = ["export", str(tmp_path), "--adapter", "x=X", "--merge", "x", "--adapter-format", "onnx_adapter"]
    assert main(argv) == 2
    assert "--merge leaves no adapter beside the graph to write as --adapter-format" in capsys.readouterr().err
