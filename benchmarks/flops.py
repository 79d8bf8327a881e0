# SPDX-License-Identifier: BSD-3-Clause
"""How many operations a training has to make, and how many this machine can make at best."""

import time
from collections.abc import Sequence
from typing import Any

import torch


def training_flops(model: Any, lengths: Sequence[int]) -> float:
    """Return the operations of forward and backward over examples that are learned from whole.

    A weight costs two operations a token forward, and two for the gradient of its input; only a trained one costs two more for its
    own. Nothing is trained below the first layer's query, key and value: they pass no gradient on. Causal attention multiplies
    half of the square of the length, twice forward and four times backward. What is computed again, padding and elementwise
    operations do not count.

    Args:
        model: A Llama with an adapter on it.
        lengths: Tokens of each example.
    """
    per_token = 0
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            lowest = any(f"layers.0.self_attn.{n}_proj" in name for n in "qkv")
            passes_on = not lowest or "lora_B" in name
            per_token += (2 + 2 * passes_on + 2 * layer.weight.requires_grad) * layer.weight.numel()
    config = model.config
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    attention = 6 * width * config.num_hidden_layers
    return float(sum(per_token * n + attention * n * n for n in lengths))


def product_flops_per_second(dtype: torch.dtype, device: str) -> float:
    """Return how fast two square matrices are multiplied, as PyTorch is set: the best of some seconds."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    began = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < 2:
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def synchronize(device: str) -> None:
    """Wait for what the device was given to do."""
    if device == "cuda":
        torch.cuda.synchronize()
