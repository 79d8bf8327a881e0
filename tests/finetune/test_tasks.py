"""Methods that hold several tasks: each row says which one it is of."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from QEfficient.errors import ConfigError
from QEfficient.finetune.batches import Collator
from QEfficient.finetune.data import Example, StreamedExamples, digest, load_examples
from QEfficient.finetune.preflight import check_tasks
from QEfficient.finetune.streams import FileRows


def test_a_row_names_its_task(write_rows: Callable[..., Path], tokenizer: Any) -> None:
    """It gets into the batch, and into what tells data apart; methods without tasks are not told."""
    rows = write_rows({"text": "a", "task_id": 2}, {"text": "b"})
    examples = load_examples(rows, tokenizer, context_length=64)
    assert [e.task for e in examples] == [2, 0]
    assert list(StreamedExamples(FileRows(rows), "data", tokenizer, context_length=64)) == examples
    assert Collator(0, tasks=3)([[e] for e in examples])["task_ids"].tolist() == [2, 0]
    assert "task_ids" not in Collator(0)([[e] for e in examples])
    assert digest(examples) != digest([Example(e.input_ids, e.labels) for e in examples])


def test_a_task_that_is_not_there(write_rows: Callable[..., Path], tokenizer: Any) -> None:
    """It is refused before training, with the number; so are packed rows, which would need several."""
    with pytest.raises(ConfigError, match=r"data\.jsonl:1: 'task_id' must be 0, 1, 2, …, not \"x\""):
        load_examples(write_rows({"text": "a", "task_id": "x"}), tokenizer, context_length=64)
    examples = [Example([1], [1], task=3)]
    check_tasks(4, examples, packing=False)
    check_tasks(0, examples, packing=True)
    with pytest.raises(ConfigError, match="task_id 3, but the adapter has 3 tasks"):
        check_tasks(3, examples, packing=False)
    with pytest.raises(ConfigError, match="leave --packing out"):
        check_tasks(4, examples, packing=True)
