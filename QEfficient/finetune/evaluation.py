# SPDX-License-Identifier: BSD-3-Clause
"""How good a model is on examples: the same numbers for any batches and any number of processes."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import PartialState

from QEfficient.finetune.batches import FILLER, ClassCollator, Collator
from QEfficient.finetune.data import IGNORED, Example
from QEfficient.finetune.model import tasks_of


def score(
    model: Any, examples: Sequence[Example], pad_token_id: int, batch_size: int, *, classes: int = 0
) -> dict[str, float]:
    """Return ``loss`` and ``perplexity``, or for that many classes ``loss``, ``accuracy`` and ``f1`` (the mean over classes)."""
    if classes:
        return classify(model, examples, pad_token_id, batch_size, classes)
    loss = evaluate(model, examples, pad_token_id, batch_size)
    return {"loss": loss, "perplexity": perplexity(loss)}


def evaluate(model: Any, examples: Sequence[Example], pad_token_id: int, batch_size: int) -> float:
    """Return the mean loss of all learned tokens of ``examples``, whatever the batches and the processes.

    Returns:
        The loss; NaN if nothing is learned in ``examples``.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=model.device)
    for batch in _batches(model, examples, Collator(pad_token_id, tasks=tasks_of(model)), batch_size):
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, -labels.shape[1] - 1 : -1].float()
        sums[0] += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        sums[1] += (labels != IGNORED).sum()
    total, count = _over_processes(sums).tolist()
    return total / count if count else math.nan


def classify(
    model: Any, examples: Sequence[Example], pad_token_id: int, batch_size: int, classes: int
) -> dict[str, float]:
    """Return mean loss, accuracy and the classes' mean F1 (0 for a class that is neither there nor said)."""
    loss = torch.zeros(1, dtype=torch.float64, device=model.device)
    said = torch.zeros(classes, classes, dtype=torch.float64, device=model.device)  # (true, predicted)
    for batch in _batches(model, examples, ClassCollator(pad_token_id), batch_size):
        labels = batch.pop("labels")
        logits = model(**batch).logits.float()
        loss += torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        real = labels != IGNORED
        one_hot = torch.nn.functional.one_hot
        said += one_hot(labels[real], classes).double().T @ one_hot(logits.argmax(-1)[real], classes).double()
    loss, said = _over_processes(loss), _over_processes(said)
    right, count = said.diagonal(), said.sum()
    f1 = 2 * right / (said.sum(0) + said.sum(1)).clamp(min=1)
    return {
        "loss": (loss / count).item(),
        "accuracy": (right.sum() / count).item(),
        "f1": f1.mean().item(),
    }


def perplexity(loss: float) -> float:
    """Return ``exp(loss)``, infinite where that is too large."""
    return math.exp(loss) if loss < 700 else math.inf


def class_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Return the mean loss of a step's examples; the models' own is a mean of each batch's, filled-up rows included.

    Args:
        outputs: With ``logits``, ``(B, classes)``.
        labels: Numbers of the classes, ``(B,)``.
        num_items_in_batch: How many examples the step has, over all its batches and processes.
    """
    total = torch.nn.functional.cross_entropy(outputs["logits"].float(), labels, ignore_index=IGNORED, reduction="sum")
    return total / (num_items_in_batch if num_items_in_batch is not None else (labels != IGNORED).sum())


def _batches(
    model: Any, examples: Sequence[Example], collator: Collator | ClassCollator, batch_size: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield this process's batches on the model's device, the model in evaluation mode and without gradients."""
    was_training = model.training
    spread = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, processes = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if spread else (0, 1)
    # Examples of alike length share a batch, so that little padding is computed.
    ordered = sorted((examples[i] for i in range(rank, len(examples), processes)), key=lambda e: len(e.input_ids))
    # The same number of batches everywhere: processes that share parameters compute together.
    ordered += [FILLER] * (-(-len(examples) // processes) - len(ordered))
    model.eval()
    try:
        with torch.no_grad():
            for i in range(0, len(ordered), batch_size):
                batch = collator([[e] for e in ordered[i : i + batch_size]])
                yield {name: t.to(model.device) for name, t in batch.items()}
    finally:
        model.train(was_training)


def _over_processes(values: torch.Tensor) -> torch.Tensor:
    """Return the sum over all processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        values = values.to(PartialState().device)  # a model that is yet to be sharded is not there
        torch.distributed.all_reduce(values)
    return values
