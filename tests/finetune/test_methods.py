"""Every method of PEFT: one step trains it, it is saved, it loads again, and it passes the test."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig

from QEfficient import testing
from QEfficient.cloud.finetune import main
from QEfficient.errors import UnsupportedError
from QEfficient.finetune.model import tasks_of
from QEfficient.testing.report import Outcome
from scripts.coverage.methods import METHODS
from tests.tiny import SHAPE, make_base

SAMPLE = ("DoRA", "IA3", "OFT", "VERA", "LN_TUNING", "POLY")
NOT_EXPORTED = {"LILY": "its router averages over all tokens of a batch"}
OF_EXPERTS = "LoRA target_parameters"


@pytest.fixture(scope="module")
def bases(base_folder: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A dense base, and one of experts."""
    folder = tmp_path_factory.mktemp("experts")
    make_base(MixtralConfig(**{**SHAPE, "vocab_size": len(tokenizer)}, num_local_experts=4)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {False: base_folder, True: folder}


def trained(base: Path, method: str, folder: Path, **options: Any) -> Path:
    """Train a step of a method; return the adapter."""
    (folder / "method").mkdir()
    METHODS[method]().save_pretrained(str(folder / "method"))
    data = folder / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": "ab" * n, "completion": "cd" * n, "task_id": n % 3}) + "\n" for n in range(1, 9))
    )
    main(
        model_name=str(base),
        train_file=data,
        output_dir=folder / "out",
        peft_config_file=folder / "method" / "adapter_config.json",
        train_batch_size=2,
        gradient_accumulation_steps=2,
        max_train_step=1,
        lr=1e-2,
        show_example=False,
        **options,
    )
    return folder / "out"


def check_loads(base: Path, adapter: Path) -> None:
    """Load an adapter as users do; what it computes is finite, and not what the base does."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    ids = torch.tensor([[1, 70, 71, 72, 73]])
    tasks = {"task_ids": torch.zeros(1, dtype=torch.int64)} if tasks_of(model) else {}
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **tasks).logits
        plain = AutoModelForCausalLM.from_pretrained(base)(input_ids=ids).logits
    assert logits.isfinite().all()
    assert (logits[:, -1] - plain[:, -1]).abs().max() > 1e-6
    assert all(t.isfinite().all() for t in load_file(adapter / "adapter_model.safetensors").values())


@pytest.mark.parametrize("method", SAMPLE)
def test_method_is_trained(bases: dict[bool, Path], tmp_path: Path, method: str) -> None:
    """Training needs to know nothing of a method."""
    check_loads(bases[False], trained(bases[False], method, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_trained_method_passes_the_test(bases: dict[bool, Path], tmp_path: Path, method: str) -> None:
    """What was trained agrees with PyTorch at every stage; what PEFT computes otherwise than row by row is refused."""
    base = bases[method == OF_EXPERTS]
    adapter = trained(base, method, tmp_path)
    check_loads(base, adapter)
    if method in NOT_EXPORTED:
        with pytest.raises(UnsupportedError, match=NOT_EXPORTED[method]):
            testing.run(base, {"one": adapter}, measure_speed=False)
        return
    report = testing.run(base, {"one": adapter}, measure_speed=False, greedy_tokens=16)
    assert report.verdict is Outcome.PASS, [f"{r.name}: {r.message}" for r in report.with_outcome(Outcome.FAIL)]
