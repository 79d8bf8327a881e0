"""Memory stays with the process from step to step, and nothing else changes."""

import ctypes
import io
import json
import os
import random
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from QEfficient.finetune.allocator import memory_kept
from tests.finetune.processes import CONTEXT

glibc = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="glibc's allocator only"
)
VOCAB = 16384


def trained(out: Path, environment: dict[str, str]) -> tuple[int, list[float]]:
    """Train twelve steps on logits of 32 MiB; return how many page faults they made, and the losses."""
    import resource

    import torch
    from rich.console import Console
    from transformers import LlamaConfig

    from QEfficient.finetune.config import TrainConfig
    from QEfficient.finetune.data import Example
    from QEfficient.finetune.model import apply_peft
    from QEfficient.finetune.train import train
    from tests.finetune.conftest import make_tokenizer
    from tests.tiny import SHAPE, make_base

    os.environ.update(environment)
    torch.set_num_threads(1)
    ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages of one size on every machine
    config = TrainConfig(
        output_dir=out, train_batch_size=8, gradient_accumulation_steps=1, max_train_step=12, lr=1e-2, lora_r=2
    )
    model = apply_peft(make_base(LlamaConfig(**{**SHAPE, "hidden_size": 16, "vocab_size": VOCAB})), config)
    draw = random.Random(0)
    rows = [[draw.randrange(3, VOCAB) for _ in range(64)] for _ in range(16)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    examples = [Example(ids, list(ids)) for ids in rows]
    train(config, model, make_tokenizer(), examples, console=Console(file=io.StringIO()))
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    log = json.loads((out / "train_log.json").read_text())
    return faults, [entry["loss"] for entry in log if "loss" in entry]


def kept_and_given_back() -> tuple[float, float]:
    """Return by how many MiB what was freed while memory is kept still counts, then and afterwards."""
    import torch

    def resident_mib() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    before = resident_mib()
    with memory_kept():
        blocks = [torch.ones(2**22) for _ in range(16)]  # 16 MiB each
        del blocks
        kept = resident_mib() - before
    return kept, resident_mib() - before


def apart(function: Callable[..., Any], *arguments: object) -> Any:
    """Run a function in a process of its own, whose heap is untouched: elsewhere it may use again what others have freed."""
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        return pool.submit(function, *arguments).result(timeout=600)


@glibc
def test_steps_use_the_same_memory_again(tmp_path: Path) -> None:
    """A training touches few new pages after its first steps; its losses are those of one that gives memory back."""
    # Whoever has set glibc's allocator keeps what he set; here its own defaults, said again.
    faults, losses = apart(trained, tmp_path / "plain", {"MALLOC_TOP_PAD_": "131072"})
    kept_faults, kept_losses = apart(trained, tmp_path / "kept", {})
    assert kept_losses == losses
    assert len(losses) == 12
    assert faults > 12 * 2 * 8192  # at least two tensors like the logits, mapped anew in each step
    assert kept_faults < faults / 3


@glibc
def test_memory_is_given_back_afterwards() -> None:
    """What was kept is free for others when training has ended."""
    kept, left = apart(kept_and_given_back)
    assert kept > 200
    assert left < 60
