# SPDX-License-Identifier: BSD-3-Clause
"""The same result to the bit, on GPUs too. Knows no training."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Compute the same each time while the block runs; PyTorch refuses what it cannot compute so.

    On CPUs that is so anyway. On GPUs gradients are added up in an order that varies, and cuBLAS must be told to
    before it is first used.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
