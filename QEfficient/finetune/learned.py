# SPDX-License-Identifier: BSD-3-Clause
"""Logits only where a token is learned: those of prompts and padding are the widest tensors of a step, and for nothing."""

from collections.abc import Sequence
from typing import Any

import torch

from QEfficient.finetune.batches import Collator, Row
from QEfficient.finetune.data import IGNORED

_PROBE = 16
"""Tokens of the rows with which a model is tried."""


def learned_only(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return ``inputs`` by which a causal language model computes the same loss from the logits of learned tokens alone.

    Args:
        inputs: Of a batch, with ``labels``, ``(B, S)``.

    Returns:
        With a mask ``logits_to_keep``, ``(B, S)``, and the ``N`` labels under it, ``(N,)``; unchanged if nothing is learned.
    """
    following = torch.nn.functional.pad(inputs["labels"], (0, 1), value=IGNORED)[:, 1:]
    learned = following != IGNORED
    if not learned.any():
        return inputs
    return {**inputs, "labels": following[learned], "shift_labels": following[learned], "logits_to_keep": learned}


def chooses_logits(model: Any, rows: Sequence[Row], collator: Collator) -> bool:
    """Try whether ``model`` takes what :func:`learned_only` returns: not every architecture and PEFT method does."""
    batch = {
        name: (t[:, :_PROBE] if t.ndim == 2 else t).to(model.device)
        for name, t in collator([rows[0], rows[-1]]).items()
    }
    if collator.packed:
        del batch["attention_mask"]
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, ::3] = IGNORED
    chosen = learned_only(batch)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            loss, found = (model(**values, use_cache=False) for values in (batch, chosen))
    except (TypeError, ValueError, IndexError, RuntimeError, AttributeError, KeyError):
        return False
    finally:
        model.train(was_training)
    rounding = 1e-5 if loss.logits.dtype == torch.float32 else 1e-2
    return found.logits.shape[:-1] == chosen["labels"].shape and bool(
        (found.loss - loss.loss).abs() <= rounding * loss.loss.abs()
    )
