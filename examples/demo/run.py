# SPDX-License-Identifier: BSD-3-Clause
"""The demo: a base that knows a shop's messages, two adapters that put them to use, and the proof that they work.

Run it with ``scripts/demo``. It writes into ``demo/`` only, and ends with exit code 0 if everything holds.
"""

import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is made here
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from QEfficient.cloud.__main__ import main as qefficient

console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)

DOCUMENTS = 14_400
STEPS = {"sql": 150, "summarise": 150}
HELD_OUT = 100
SHOWN = 2


def main(folder: Path = Path("demo")) -> int:
    """Run the story and return the exit code."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.disable_progress_bar()  # the trainings show their own
    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    with stage("1. Train a base: its tokenizer and a small Llama, from the shop's text"):
        train_base(folder)
    for task, steps in STEPS.items():
        with stage(f"2. Fine-tune the adapter {task!r}"):
            fine_tune(folder, task, steps)
    with stage("3. Export, compile and generate: one program, the adapters switched in it"):
        accuracy = generate(folder)
    with stage("4. Test everything against PyTorch + PEFT"):
        adapters = [f"--adapter={task}={folder / task}" for task in STEPS]
        code = qefficient(["test", str(folder / "base"), *adapters, "--report", str(folder / "report")])
    learned = all(accuracy[task][task] >= 0.9 and accuracy["base"][task] < 0.2 for task in STEPS)
    console.print(f"\n{time.perf_counter() - start:.0f} s in all. Open {(folder / 'report' / 'report.html').resolve()}")
    if not learned:
        console.print("[red]an adapter did not learn its task: at least 90 % right with it, under 20 % without[/red]")
    return code if code else int(not learned)


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Print a heading before, and the time taken after."""
    console.print(f"\n[bold]{title}[/bold]")
    start = time.perf_counter()
    yield
    console.print(f"[dim]{time.perf_counter() - start:.0f} s[/dim]")


def train_base(folder: Path) -> None:
    """Make the text, the tokenizer and the base."""
    from base import train_base as train
    from corpus import documents

    texts = documents(DOCUMENTS)
    console.print(f"{DOCUMENTS:,} documents like this one:\n[dim]{texts[0]}[/dim]")
    model = train(texts, folder / "base")
    console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters, saved to {folder / 'base'}")


def fine_tune(folder: Path, task: str, steps: int) -> None:
    """Write the task's data and run ``qefficient finetune`` on it."""
    from corpus import examples, write_jsonl

    batch_size = 16
    train = write_jsonl(examples(task, steps * batch_size, seed=1), folder / "data" / f"{task}.jsonl")
    val = write_jsonl(examples(task, HELD_OUT, seed=2), folder / "data" / f"{task}.val.jsonl")
    options = {
        "model_name": folder / "base",
        "train_file": train,
        "val_file": val,
        "output_dir": folder / task,
        "context_length": 128,
        "train_batch_size": batch_size,
        "val_batch_size": 32,
        "gradient_accumulation_steps": 1,
        "lr": 3e-3,
        "lora_r": 8,
        "lora_alpha": 16,
        "target_modules": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    if qefficient(["finetune", *arguments]) != 0:
        sys.exit(1)


def generate(folder: Path) -> dict[str, dict[str, float]]:
    """Complete held-out prompts with the base and each adapter; show some, return the share of exact matches."""
    from program import completions

    rows = {task: read_jsonl(folder / "data" / f"{task}.val.jsonl") for task in STEPS}
    prompts = [row["prompt"] for row in rows["sql"]]  # the same messages for both tasks
    written = completions(folder, list(STEPS), prompts)
    table = Table("message", "who", "writes", show_lines=True)
    for i in range(SHOWN):
        for number, (name, texts) in enumerate(written.items()):
            table.add_row(prompts[i].strip() if number == 0 else "", name, texts[i].strip())
    console.print(table)
    accuracy = {
        name: {task: exact(texts, [row["completion"] for row in rows[task]]) for task in STEPS}
        for name, texts in written.items()
    }
    for task in STEPS:
        shares = ", ".join(f"{name} {accuracy[name][task]:.0%}" for name in written)
        console.print(f"{HELD_OUT} messages never seen, task {task!r} exactly right: {shares}")
    return accuracy


def exact(texts: list[str], expected: list[str]) -> float:
    """Return the share of ``texts`` that are what was expected."""
    return sum(text.strip() == right for text, right in zip(texts, expected, strict=True)) / len(expected)


def read_jsonl(path: Path) -> list[dict[str, str]]:
    """Return the rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
