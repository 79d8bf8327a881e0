# SPDX-License-Identifier: BSD-3-Clause
"""Prompt learning: virtual tokens as the cache entries that they amount to.

Virtual tokens stand in front of every prompt and see nothing but each other. So their keys and values depend on the
adapter and the base alone, and are computed once: PEFT makes embeddings (prompt tuning, P-tuning, CPT) or cache entries
(prefix tuning, cartridges), and embeddings run through the base. No method is named here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import Cache, DynamicCache

from QEfficient.errors import UnsupportedError
from QEfficient.export.lift import inner_model
from QEfficient.peft.tasks import task_of


def first_entries(model: PeftModel, name: str) -> dict[str, np.ndarray]:
    """Return what adapter ``name`` puts first into every row of the cache, ``(kv_heads, V, head_dim)`` by state name.

    Raises:
        UnsupportedError: The base keeps something else than keys and values.
    """
    task = torch.tensor([task_of(model, name)])
    with torch.no_grad(), _active(model, name):
        made = model.get_prompt(batch_size=1, task_ids=task)
        cache = made if isinstance(made, Cache) else _through_base(model, made)
    config: Any = model.peft_config[name]
    count = config.num_virtual_tokens
    entries: dict[str, np.ndarray] = {}
    for index, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or not keys.numel():
            continue
        entries[f"past_key.{index}"], entries[f"past_value.{index}"] = (_rows(t, count) for t in (keys, values))
    if not entries:
        base = type(inner_model(model)).__name__
        raise UnsupportedError(f"{base} keeps no keys and values, so virtual tokens have no place in its cache")
    return entries


def _through_base(model: PeftModel, embeddings: torch.Tensor) -> Cache:
    base = inner_model(model)
    dtype = base.get_input_embeddings().weight.dtype  # type: ignore[operator]
    cache: Cache = base(
        inputs_embeds=embeddings.to(dtype), past_key_values=DynamicCache(), use_cache=True
    ).past_key_values
    return cache


def _rows(tensor: torch.Tensor, count: int) -> np.ndarray:
    """Return ``(kv_heads, count, head_dim)``; a layer with a sliding window may keep the last entries only."""
    kept: np.ndarray = tensor[0].detach().float().cpu().numpy()
    return np.pad(kept, [(0, 0), (count - kept.shape[1], 0), (0, 0)])


@contextmanager
def _active(model: PeftModel, name: str) -> Iterator[None]:
    before, model.active_adapter = model.active_adapter, name
    try:
        yield
    finally:
        model.active_adapter = before
