# SPDX-License-Identifier: BSD-3-Clause
"""What can only be refused with the model at hand, before it is trained. Knows no files."""

from collections.abc import Sequence
from typing import Any

import torch

from QEfficient.errors import ConfigError, UnsupportedError
from QEfficient.finetune.batches import Collator, Rows
from QEfficient.finetune.data import Example


def longest(model: Any, tokenizer: Any, *, classifies: bool) -> int | None:
    """Return how many tokens an example may have at most, virtual ones of the adapter left out; None if nothing says so.

    Args:
        model: With its adapter.
        tokenizer: Its own limit counts for classifiers: some of them number positions from 2.
        classifies: Whether classes are learned.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    virtual = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0
    return min(positions, tokenizer.model_max_length if classifies else positions) - virtual


def check_recomputing(model: Any) -> None:
    """Refuse ``gradient_checkpointing`` where the model's layers do not support it.

    Raises:
        UnsupportedError: They do not.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not base.supports_gradient_checkpointing:
        raise UnsupportedError(
            f"{type(base).__name__} cannot compute activations again: leave --gradient-checkpointing out"
        )


def check_packing(model: Any, rows: Rows, collator: Collator) -> None:
    """Compare a packed row with its examples apart: not every model and PEFT method keeps them apart by position.

    Raises:
        UnsupportedError: The losses differ.
    """
    row = max((rows[i] for i in range(min(rows.real, 50))), key=len)
    was_training = model.training
    model.eval()

    def loss(examples: list[Example]) -> float:
        batch = {name: t.to(model.device) for name, t in collator([examples]).items() if name != "attention_mask"}
        return float(model(**batch, use_cache=False, num_items_in_batch=1).loss)

    with torch.inference_mode():
        together, apart = loss(row), sum(loss([e]) for e in row)
    model.train(was_training)
    if abs(together - apart) > 1e-2 * abs(apart):
        raise UnsupportedError(
            f"packed examples see each other in {type(model).__name__}: their loss is {together:.4g} together "
            f"and {apart:.4g} apart. Leave --packing out"
        )


def check_tasks(tasks: int, examples: Sequence[Example], *, packing: bool) -> None:
    """Refuse what a method that holds several tasks cannot be trained on.

    Raises:
        ConfigError: An example is of a task that the adapter does not have, or examples are packed.
    """
    if tasks and packing:
        raise ConfigError(
            f"a row has one task, of the adapter's {tasks}, so examples cannot share it: leave --packing out"
        )
    highest = max((e.task for e in examples), default=0)
    if tasks and highest >= tasks:
        raise ConfigError(f"an example has task_id {highest}, but the adapter has {tasks} tasks, numbered from 0")
