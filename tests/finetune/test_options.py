"""Options of the training: each does what it says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from QEfficient.errors import ConfigError, UnsupportedError
from QEfficient.finetune.config import TrainConfig, resolve
from QEfficient.finetune.data import Example, tokenize
from QEfficient.finetune.formats import Segment
from QEfficient.finetune.model import apply_peft, load_model_and_tokenizer
from QEfficient.finetune.sharding import ShardedCallback
from QEfficient.finetune.train import train
from QEfficient.finetune.trainer import split_batch, training_arguments
from tests.finetune.test_train import QUIET, run


@pytest.fixture
def examples(tokenizer: Any) -> list[Example]:
    """Eight prompts and answers of different lengths."""
    return [tokenize([Segment("p" * i, False), Segment("ab" * i, True)], tokenizer, 64) for i in range(1, 9)]


def log(folder: Path) -> list[dict[str, float]]:
    """Return what happened in each step."""
    entries: list[dict[str, float]] = json.loads((folder / "train_log.json").read_text())
    return entries


def test_going_on_from_an_adapter(base_folder: Path, tmp_path: Path, examples: list[Example]) -> None:
    """The second training starts with the loss that the first ended with, and keeps its rank."""
    _, first = run(base_folder, tmp_path / "a", examples)
    options = {"from_peft_checkpoint": tmp_path / "a", "lora_r": None}
    model, second = run(base_folder, tmp_path / "b", examples, **options)
    assert second["eval_loss_before"] == pytest.approx(first["eval_loss"], abs=1e-5)
    assert second["eval_loss"] < first["eval_loss"]
    assert model.peft_config["default"].r == 2
    assert (tmp_path / "b" / "adapter_model.safetensors").is_file()


def test_going_on_needs_an_adapter_that_fits(base_folder: Path, tmp_path: Path, examples: list[Example]) -> None:
    """A folder without an adapter, an option the adapter decides, and a damaged file are refused."""
    data = tmp_path / "t.jsonl"
    data.write_text('{"text": "a"}\n')
    needed = {"model_name": "base", "train_file": data, "output_dir": tmp_path / "out"}
    with pytest.raises(ConfigError, match="is no adapter: it has no adapter_config"):
        resolve("t", **needed, from_peft_checkpoint=tmp_path)
    with pytest.raises(ConfigError, match="lora_r is given, but from_peft_checkpoint has decided it"):
        resolve("t", **needed, from_peft_checkpoint=tmp_path, lora_r=4)
    run(base_folder, tmp_path / "a", examples, max_train_step=1)
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"")
    config = TrainConfig(model_name=str(base_folder), from_peft_checkpoint=tmp_path / "a")
    base, _ = load_model_and_tokenizer(config)
    with pytest.raises(ConfigError, match=r"from_peft_checkpoint .* does not fit LlamaForCausalLM"):
        apply_peft(base, config)


def run_against(other: list[Example], base_folder: Path, out: Path, examples: list[Example], **options: Any) -> Any:
    """Train on ``examples`` while ``other`` is what counts; return the metrics."""
    given = {"train_batch_size": 2, "gradient_accumulation_steps": 1, "lr": 1e-2, "lora_r": 2, "eval_steps": 1}
    config = TrainConfig(model_name=str(base_folder), output_dir=out, warmup_ratio=0.0, **{**given, **options})
    base, tokenizer = load_model_and_tokenizer(config, None)
    return train(config, apply_peft(base, config), tokenizer, examples, other, console=QUIET)


@pytest.fixture
def contrary(tokenizer: Any) -> list[Example]:
    """The prompts of the examples with answers that contradict them."""
    return [tokenize([Segment("p" * i, False), Segment("cd" * i, True)], tokenizer, 64) for i in range(1, 4)]


def test_best_step_is_saved(
    base_folder: Path, tmp_path: Path, examples: list[Example], contrary: list[Example]
) -> None:
    """When training makes the validation worse, the adapter is the one of the step with the lowest loss."""
    options = {"max_train_step": 8, "keep_best": True, "keep_checkpoints": 1}
    metrics = run_against(contrary, base_folder, tmp_path / "a", examples, **options)
    losses = {e["step"]: e["eval_loss"] for e in log(tmp_path / "a") if "eval_loss" in e}
    assert metrics["best_step"] == min(losses, key=lambda step: losses[step]) < 8
    assert metrics["eval_loss"] == pytest.approx(min(losses.values()), abs=1e-6)
    assert metrics["eval_loss"] < losses[8]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_early_stopping(base_folder: Path, tmp_path: Path, examples: list[Example], contrary: list[Example]) -> None:
    """When two validations in a row are no better, training stops."""
    metrics = run_against(contrary, base_folder, tmp_path / "a", examples, max_train_step=30, early_stopping=2)
    losses = [e["eval_loss"] for e in log(tmp_path / "a") if "eval_loss" in e]
    assert metrics["train_steps"] == len(losses) < 30
    assert min(losses) == losses[-3]


def test_accumulation_is_exact_step_by_step(base_folder: Path, tmp_path: Path, examples: list[Example]) -> None:
    """One batch of four, two of two and four of one have the same loss in each step, though lengths differ."""
    curves = []
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        given = {"train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_train_step": 12}
        run(base_folder, tmp_path / str(batch), examples, **given)
        curves.append([e["loss"] for e in log(tmp_path / str(batch)) if "loss" in e])
    assert len(curves[0]) == 12
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)
    assert curves[2] == pytest.approx(curves[0], abs=1e-5)


def test_gradient_checkpointing_changes_nothing(base_folder: Path, tmp_path: Path, examples: list[Example]) -> None:
    """Activations that are computed again are the same."""
    for name, on in (("a", False), ("b", True)):
        run(base_folder, tmp_path / name, examples, gradient_checkpointing=on)
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, rtol=1e-4, atol=1e-5)


def test_bfloat16_base_keeps_the_adapter_in_float32(base_folder: Path, tmp_path: Path, examples: list[Example]) -> None:
    """What is trained stays precise; losses are near those of float32."""
    _, exact = run(base_folder, tmp_path / "a", examples)
    model, rounded = run(base_folder, tmp_path / "b", examples, dtype="bfloat16")
    assert model.base_model.model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert {t.dtype for t in load_file(tmp_path / "b" / "adapter_model.safetensors").values()} == {torch.float32}
    assert rounded["train_loss"] == pytest.approx(exact["train_loss"], rel=0.02)


def test_full_fine_tuning_saves_a_base(base_folder: Path, tmp_path: Path, examples: list[Example]) -> None:
    """Without PEFT the folder is a model like the one that was trained."""
    options = {"use_peft": False, "lora_r": None, "lr": 1e-3, "save_steps": 2}
    model, metrics = run(base_folder, tmp_path / "a", examples, **options)
    assert metrics["eval_loss"] < metrics["eval_loss_before"]
    assert metrics["trained_parameters"] == metrics["parameters"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    ids = torch.tensor([examples[-1].input_ids])
    torch.testing.assert_close(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_arguments_reach_the_trainer(tmp_path: Path) -> None:
    """Schedule, warm-up, decay, clipping and noise are the Trainer's own."""
    config = TrainConfig(
        lr_schedule="cosine", warmup_ratio=0.1, weight_decay=0.2, max_grad_norm=0.3, neftune_alpha=5.0, num_epochs=2
    )
    arguments = training_arguments(config, 400, tmp_path)
    assert arguments.lr_scheduler_type == "cosine"
    assert arguments.warmup_steps == 20  # a tenth of two epochs of 100 steps
    assert (arguments.weight_decay, arguments.max_grad_norm, arguments.neftune_noise_alpha) == (0.2, 0.3, 5.0)


def test_schedule_and_clipping(base_folder: Path, tmp_path: Path, examples: list[Example]) -> None:
    """The learning rate rises for the warm-up and falls to the end; a tiny clip hardly moves the weights."""
    _, _ = run(base_folder, tmp_path / "a", examples, max_train_step=10, warmup_ratio=0.3)
    rates = [e["learning_rate"] for e in log(tmp_path / "a") if "loss" in e]
    assert rates[:4] == pytest.approx([0, 1e-2 / 3, 2e-2 / 3, 1e-2])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] < 2e-3


def test_metrics_switched_off_does_not_crash(base_folder: Path, tmp_path: Path, examples: list[Example]) -> None:
    """Without metrics there is the adapter and what is needed to train it again."""
    _, metrics = run(base_folder, tmp_path / "a", examples, save_metrics=False)
    assert metrics["train_steps"] == 6
    assert not (tmp_path / "a" / "train_metrics.json").exists()
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")


def test_packing_is_refused_where_examples_would_mix(
    base_folder: Path, tmp_path: Path, examples: list[Example]
) -> None:
    """Prompt tuning puts tokens in front of a row, not of each example: that is noticed before training."""
    path = tmp_path / "peft.yaml"
    path.write_text("peft_type: PREFIX_TUNING\nnum_virtual_tokens: 4\n")
    options = {"peft_config_file": path, "lora_r": None, "packing": True, "context_length": 64}
    with pytest.raises(UnsupportedError, match="Leave --packing out"):
        run(base_folder, tmp_path / "a", examples, **options)
    assert list(tmp_path.iterdir()) == [path]


def test_processes_share_the_batch() -> None:
    """The global batch stays what it is for any number of processes, or that is refused."""
    assert split_batch(2, 4, 1) == (2, 4)
    assert split_batch(2, 4, 2) == (2, 2)
    assert split_batch(6, 1, 3) == (2, 1)
    with pytest.raises(ConfigError, match="3 processes cannot share train_batch_size 2 times gradient_accum"):
        split_batch(2, 4, 3)


def test_fsdp_of_one_process_is_refused(tmp_path: Path) -> None:
    """There is nothing to shard over."""
    with pytest.raises(ConfigError, match="fsdp shards over processes, and there is one"):
        training_arguments(TrainConfig(fsdp=True), 8, tmp_path)


def test_fsdp_that_does_not_shard_is_refused() -> None:
    """Parameters that are whole on each process are noticed, whatever the losses say."""
    with pytest.raises(UnsupportedError, match="2 parameters of Linear are not sharded: weight"):
        ShardedCallback().on_train_begin(None, None, None, model=torch.nn.Linear(1, 1))
