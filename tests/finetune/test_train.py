"""The training itself: losses, seeds, what is saved."""

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from rich.console import Console

from QEfficient.finetune.allocator import peak_memory_bytes
from QEfficient.finetune.config import TrainConfig
from QEfficient.finetune.data import IGNORED, Example, tokenize
from QEfficient.finetune.formats import Segment
from QEfficient.finetune.model import apply_peft, load_model_and_tokenizer
from QEfficient.finetune.train import evaluate, perplexity, train
from tests.tiny import make_base

QUIET = Console(file=io.StringIO())


@pytest.fixture
def examples(tokenizer: Any) -> list[Example]:
    """Eight prompts and answers of different lengths."""
    return [tokenize([Segment("p" * i, False), Segment("ab" * i, True)], tokenizer, 64) for i in range(1, 9)]


def run(base_folder: Path, out: Path, examples: list[Example], **options: Any) -> tuple[Any, dict[str, float]]:
    """Train an adapter for six steps and return model and metrics."""
    given = {"train_batch_size": 2, "gradient_accumulation_steps": 1, "max_train_step": 6, "lr": 1e-2, "lora_r": 2}
    config = TrainConfig(model_name=str(base_folder), output_dir=out, **{**given, **options})
    base, tokenizer = load_model_and_tokenizer(config, None)
    model = apply_peft(base, config)
    return model, train(config, model, tokenizer, examples, examples[:3], console=QUIET)


def test_saved_adapter_is_the_trained_model(base_folder: Path, tmp_path: Path, examples: list[Example]) -> None:
    """PEFT loads the folder from any place, and the logits are those of the model that was trained."""
    model, metrics = run(base_folder, tmp_path / "a", examples)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    ids = torch.tensor([examples[-1].input_ids])
    torch.testing.assert_close(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert Path(loaded.peft_config["default"].base_model_name_or_path).is_absolute()
    assert json.loads((tmp_path / "a" / "train_metrics.json").read_text()) == metrics
    assert (tmp_path / "a" / "tokenizer.json").is_file()


def test_metrics_say_what_happened(base_folder: Path, tmp_path: Path, examples: list[Example]) -> None:
    """Six steps lower the loss; perplexity is its exponential; speed is tokens by time."""
    _, metrics = run(base_folder, tmp_path / "a", examples)
    assert metrics["train_steps"] == 6
    assert metrics["eval_loss"] < metrics["eval_loss_before"] - 0.1
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    tokens = metrics["train_tokens_per_second"] * metrics["train_seconds"]
    assert 6 * 2 * 5 <= tokens <= 6 * 2 * 26  # the shortest and the longest example


def test_same_seed_gives_the_same_adapter(base_folder: Path, tmp_path: Path, examples: list[Example]) -> None:
    """Two trainings with one seed are equal bit for bit; another seed gives another adapter."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(base_folder, tmp_path / name, examples, seed=seed)
    a, b, c = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_deterministic_lasts_as_long_as_the_training(
    base_folder: Path, tmp_path: Path, examples: list[Example]
) -> None:
    """PyTorch refuses what it cannot compute the same each time, and only then."""
    for wanted in (False, True):
        config = TrainConfig(output_dir=tmp_path / str(wanted), max_train_step=1, deterministic=wanted)
        base, tokenizer = load_model_and_tokenizer(TrainConfig(model_name=str(base_folder)), None)
        seen = []
        base.lm_head.register_forward_hook(
            lambda *args, seen=seen: seen.append(torch.are_deterministic_algorithms_enabled())
        )
        train(config, apply_peft(base, config), tokenizer, examples, console=QUIET)
        assert set(seen) == {wanted}
        assert not torch.are_deterministic_algorithms_enabled()


def test_accumulated_steps_are_large_batches(base_folder: Path, tmp_path: Path, examples: list[Example]) -> None:
    """One batch of four and four of one give the same losses, though the examples' lengths differ."""
    _, whole = run(base_folder, tmp_path / "a", examples, train_batch_size=4, gradient_accumulation_steps=1)
    _, parts = run(base_folder, tmp_path / "b", examples, train_batch_size=1, gradient_accumulation_steps=4)
    assert parts["train_loss"] == pytest.approx(whole["train_loss"], abs=1e-5)
    assert parts["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-5)


def test_ia3_is_trained(base_folder: Path, tmp_path: Path, examples: list[Example]) -> None:
    """A method other than LoRA trains and loads in the same way."""
    options = {"peft_method": "ia3", "lora_r": None, "lr": 0.1}
    _, metrics = run(base_folder, tmp_path / "a", examples, **options)
    assert metrics["eval_loss"] < metrics["eval_loss_before"]
    assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a").peft_config["default"].peft_type == "IA3"


def test_failed_training_leaves_nothing(base_folder: Path, tmp_path: Path, examples: list[Example]) -> None:
    """When the training breaks, there is no adapter folder, and an older one stays."""
    broken = [Example([5, 10**6], [IGNORED, 5])]
    with pytest.raises(IndexError):
        run(base_folder, tmp_path / "a", broken)
    assert list(tmp_path.iterdir()) == []
    run(base_folder, tmp_path / "a", examples)
    kept = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(IndexError):
        run(base_folder, tmp_path / "a", broken, overwrite=True)
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == kept
    run(base_folder, tmp_path / "a", examples, overwrite=True, seed=7)
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() != kept
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_loss_is_per_token_for_any_batch(examples: list[Example]) -> None:
    """The validation loss does not depend on how the examples are batched."""
    model = make_base("llama").eval()
    short = [Example([i % 128 for i in e.input_ids], [x % 128 if x >= 0 else x for x in e.labels]) for e in examples]
    losses = [evaluate(model, short, 0, size) for size in (1, 3, 8)]
    expected, count = 0.0, 0
    for e in short:
        logits = model(input_ids=torch.tensor([e.input_ids])).logits[0, :-1]
        labels = torch.tensor(e.labels[1:])
        expected += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += int((labels != IGNORED).sum())
    assert losses == pytest.approx([expected / count] * 3, rel=1e-5)


def test_nothing_to_learn_has_no_loss() -> None:
    """A loss over no tokens is not a number rather than an error; a huge one has an infinite perplexity."""
    assert math.isnan(evaluate(make_base(), [Example([1, 2], [IGNORED, IGNORED])], 0, 1))
    assert perplexity(1000.0) == math.inf


def test_progress_is_written_in_lines_without_a_terminal(
    base_folder: Path, tmp_path: Path, examples: list[Example]
) -> None:
    """Logs get the loss at each tenth of the training, and how long it still takes."""
    console = Console(file=io.StringIO(), width=200)
    config = TrainConfig(
        output_dir=tmp_path / "a", train_batch_size=2, gradient_accumulation_steps=1, max_train_step=20
    )
    base, tokenizer = load_model_and_tokenizer(TrainConfig(model_name=str(base_folder)), None)
    train(config, apply_peft(base, config), tokenizer, examples, title="sql", console=console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0] == "sql: 20 steps"
    assert [line.split("  ")[0] for line in lines[1:]] == [f"sql: {n}/20" for n in range(2, 21, 2)]
    assert "loss " in lines[1]
    assert " s left" in lines[1]
    held = re.search(r"  (\d+\.\d) GiB  ", lines[1])
    assert held is not None
    assert float(held[1]) == pytest.approx(peak_memory_bytes() / 2**30, abs=0.2)
