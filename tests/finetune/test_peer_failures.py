"""What goes wrong elsewhere: each test is named after a failure that was seen in another tool."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from QEfficient.cloud.finetune import main
from QEfficient.finetune import checkpoints
from QEfficient.finetune import train as training
from QEfficient.finetune.batches import Collator
from QEfficient.finetune.data import IGNORED, Example, load_examples
from tests.finetune.conftest import make_tokenizer
from tests.finetune.test_train import run

ALPACA = {"instruction": "Add the numbers.", "input": "1 1", "output": "two"}


@pytest.fixture
def needed(base_folder: Path, write_rows: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    """The options without which nothing is trained, of a training of six steps."""
    rows = [{"prompt": "p" * i, "completion": "ab" * i} for i in range(1, 13)]
    return {
        "model_name": str(base_folder),
        "train_file": write_rows(*rows),
        "output_dir": tmp_path / "out",
        "train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "lora_r": 2,
    }


def losses(folder: Path) -> list[float]:
    """Return the loss of each step."""
    return [entry["loss"] for entry in json.loads((folder / "train_log.json").read_text()) if "loss" in entry]


def test_a_local_folder_is_a_base(needed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere a folder is refused as an invalid Hub id."""
    folder = Path(needed["model_name"])
    monkeypatch.chdir(folder.parent)
    main(**{**needed, "model_name": f"./{folder.name}"})
    assert (needed["output_dir"] / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("length", [32, 64, 512])
def test_context_length_cuts_and_keeps_labels(write_rows: Callable[..., Path], tokenizer: Any, length: int) -> None:
    """Elsewhere 32 leaves 41 tokens as they are, and 256 pads the prompt so that only EOS is learned."""
    (example,) = load_examples(write_rows(ALPACA), tokenizer, context_length=length)
    assert len(example.input_ids) == len(example.labels) <= length
    assert tokenizer.decode([x for x in example.labels if x != IGNORED]) == "two</s>"
    batch = Collator(tokenizer.pad_token_id)([[example]])
    assert int(batch["attention_mask"].sum()) == len(example.input_ids)


def test_loss_under_a_step_limit_is_the_mean_of_its_steps(needed: dict[str, Any]) -> None:
    """Elsewhere eight steps that average 6.312 are reported as 5.611: divided by one too many."""
    metrics = main(**needed, max_train_step=4)
    assert len(losses(needed["output_dir"])) == 4
    assert metrics["train_loss"] == pytest.approx(sum(losses(needed["output_dir"])) / 4)


def test_fully_masked_rows_do_not_inflate_the_loss(base_folder: Path, tmp_path: Path, tokenizer: Any) -> None:
    """Elsewhere a batch with one real row of four counts four times."""
    ids = tokenizer("<s>abcd</s>").input_ids
    real, masked = Example(ids, list(ids)), Example(ids, [IGNORED] * len(ids))
    options = {"train_batch_size": 4, "max_train_step": 1}
    _, alone = run(base_folder, tmp_path / "a", [real], **options)
    _, among = run(base_folder, tmp_path / "b", [real, masked, masked, masked], **options)
    assert among["train_loss"] == pytest.approx(alone["train_loss"], abs=1e-5)


def test_nothing_left_to_train_is_no_error(needed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere resuming after the last step raises UnboundLocalError; a finished epoch is trained again."""

    def full(*args: Any) -> None:
        raise OSError("no space left on device, say")

    with monkeypatch.context() as patch:
        patch.setattr(training, "_write", full)
        with pytest.raises(OSError, match="no space left"):
            main(**needed, save_steps=3)
    newest = checkpoints.listed(checkpoints.folder_for(needed["output_dir"]))[0]
    assert checkpoints.step_of(newest) == 6
    metrics = main(**needed, save_steps=3, resume=True)
    assert metrics["train_steps"] == 6
    assert len(losses(needed["output_dir"])) == 6


def test_two_trainings_in_one_process_do_not_mix(needed: dict[str, Any], tmp_path: Path) -> None:
    """Elsewhere each call adds a log handler and leaves global settings behind."""
    before = (torch.are_deterministic_algorithms_enabled(), torch.get_num_threads())
    main(**needed)
    main(**{**needed, "output_dir": tmp_path / "again"})
    assert losses(needed["output_dir"]) == losses(tmp_path / "again")
    assert (torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()) == before


def test_the_model_learns_to_stop_when_padding_is_eos(write_rows: Callable[..., Path]) -> None:
    """Elsewhere masking the padding token masks the end of the answer as well."""
    tokenizer = make_tokenizer(pad_token="</s>")
    examples = load_examples(write_rows(ALPACA, {**ALPACA, "output": "longer"}), tokenizer, context_length=512)
    labels = Collator(tokenizer.pad_token_id)([[e] for e in examples])["labels"]
    assert [int((row == tokenizer.eos_token_id).sum()) for row in labels] == [1, 1]
