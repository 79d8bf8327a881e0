"""Order, packing, padding: what is learned does not depend on them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from QEfficient.finetune.batches import Collator, EpochOrder, Rows, pack
from QEfficient.finetune.data import IGNORED, Example, tokenize
from QEfficient.finetune.formats import Segment
from tests.finetune.test_train import run
from tests.tiny import make_base


@pytest.fixture
def examples(tokenizer: Any) -> list[Example]:
    """Twelve prompts and answers of very different lengths."""
    return [tokenize([Segment("p" * i, False), Segment("ab" * i, True)], tokenizer, 64) for i in range(1, 13)]


def test_packing_fills_rows() -> None:
    """No row exceeds the capacity, nothing is lost, and few rows are needed."""
    lengths = [7, 3, 5, 5, 2, 8, 1, 9]
    rows = pack(lengths, 10)
    assert sorted(i for row in rows for i in row) == list(range(8))
    assert [sum(lengths[i] for i in row) for row in rows] == [10, 10, 10, 10]


@pytest.mark.parametrize("style", ["llama", "mistral", "qwen2", "qwen3", "gemma2"])
def test_packed_examples_do_not_see_each_other(style: str) -> None:
    """The summed loss of rows with several examples is that of the examples apart, gradients included."""
    torch.manual_seed(0)
    sizes = (5, 9, 3, 8, 6)
    examples = [Example(ids, [IGNORED, *ids[1:]]) for ids in (torch.randint(3, 128, (n,)).tolist() for n in sizes)]
    model = make_base(style)
    model.config.use_cache = False  # as in training
    rows = Rows(examples, 1, context_length=17)
    assert len(rows) == 2
    batch = Collator(0, packed=True)([rows[0], rows[1]])
    count = int((batch["labels"][:, 1:] != IGNORED).sum())
    assert count == sum(sizes) - len(sizes)
    del batch["attention_mask"]
    together = model(**batch, num_items_in_batch=1).loss
    apart = torch.stack([model(**Collator(0)([[e]]), num_items_in_batch=1).loss for e in examples]).sum()
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-4)
    norms = []
    for loss in (together, apart):
        model.zero_grad()
        loss.backward()
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone())
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-3, atol=1e-4)


def test_packed_training_learns_the_same_tokens(base_folder: Path, tmp_path: Path, examples: list[Example]) -> None:
    """One packed step over all examples has the loss of one padded step over all; padding is not counted."""
    _, padded = run(base_folder, tmp_path / "a", examples, train_batch_size=12, max_train_step=1)
    packed_rows = len(Rows(examples, 1, context_length=64))
    given = {"train_batch_size": packed_rows, "max_train_step": 1, "packing": True, "context_length": 64}
    _, packed = run(base_folder, tmp_path / "b", examples, **given)
    assert packed["train_loss"] == pytest.approx(padded["train_loss"], abs=1e-5)
    assert packed["eval_loss"] == pytest.approx(padded["eval_loss"], abs=1e-5)
    tokens = [m["train_tokens_per_second"] * m["train_seconds"] for m in (padded, packed)]
    assert tokens[0] == pytest.approx(tokens[1])


def test_order_is_of_seed_and_epoch_alone(examples: list[Example]) -> None:
    """Each epoch has another order, the same for the same seed, whatever was drawn before."""
    rows = Rows(examples, 5)
    order = EpochOrder(rows, 5, 3)
    first = list(order)
    torch.rand(5)
    assert list(EpochOrder(rows, 5, 3)) == first
    order.epoch = 1
    assert list(order) != first
    assert sorted(order) == list(range(15))
    assert first[12:] == [12, 13, 14]  # what fills the last step up comes last


def test_order_by_length_saves_padding(examples: list[Example]) -> None:
    """Examples that share a batch are of alike length; which batch comes first is drawn."""
    rows = Rows(examples, 4)
    order = list(EpochOrder(rows, 4, 0, by_length=True))
    sizes = [sorted(len(rows[i][0].input_ids) for i in order[at : at + 4]) for at in (0, 4, 8)]
    assert sorted(sizes) == [sorted(len(e.input_ids) for e in examples)[at : at + 4] for at in (0, 4, 8)]


def test_last_step_of_an_epoch_has_no_more_weight(base_folder: Path, tmp_path: Path, examples: list[Example]) -> None:
    """Rows that fill it up teach nothing: the loss of a step is that of its real examples."""
    given = {"train_batch_size": 8, "max_train_step": 0, "num_epochs": 1, "lr": 1e-9}
    _, metrics = run(base_folder, tmp_path / "a", examples[:3], **given)
    assert metrics["train_steps"] == 1
    assert metrics["train_loss"] == pytest.approx(metrics["eval_loss_before"], abs=1e-5)
