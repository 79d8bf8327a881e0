# SPDX-License-Identifier: BSD-3-Clause
"""Training on transformers' ``Trainer``, its progress, its result. Knows examples and a model, no files of data."""

import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from QEfficient.finetune.config import CONFIG_FILE, TrainConfig, write
from QEfficient.finetune.data import IGNORED, Collator, Example
from QEfficient.store import written_aside

METRICS_FILE = "train_metrics.json"
"""What :func:`train` returned, beside the adapter."""

_LINES = 10
"""How often the loss is shown."""


class ProgressCallback(TrainerCallback):
    """Shows loss and speed: as a bar on a terminal, as some lines elsewhere.

    Attributes:
        title: What is being trained.
        console: Where to show it.
    """

    def __init__(self, title: str, console: Console | None = None) -> None:
        self.title = title
        self.console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._task: Any = None
        self._loss = ""
        self._start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw an empty bar, or say what begins."""
        self._start = time.perf_counter()
        if not self.console.is_terminal:
            self._line(f"{self.title}: {state.max_steps} steps")
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        self._bar = Progress(
            *columns,
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._bar.add_task(self.title, total=state.max_steps, loss="")
        self._bar.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the loss; without a terminal, in a line of its own."""
        if not logs or "loss" not in logs:
            return
        self._loss = f"loss {float(logs['loss']):.3f}"
        if self._bar is None:
            step, elapsed = state.global_step, time.perf_counter() - self._start
            left = elapsed / step * (state.max_steps - step)
            self._line(f"{self.title}: {step}/{state.max_steps}  {self._loss}  {elapsed:.0f} s, {left:.0f} s left")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar:
            self._bar.update(self._task, completed=state.global_step, loss=self._loss)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the finished bar."""
        if self._bar:
            self._bar.update(self._task, loss=self._loss)
            self._bar.stop()

    def _line(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)


def train(
    config: TrainConfig,
    model: Any,
    tokenizer: Any,
    train_set: list[Example],
    val_set: list[Example] | None = None,
    *,
    title: str = "training",
    console: Console | None = None,
) -> dict[str, float]:
    """Train ``model`` and save what was trained in ``config.output_dir``, which appears only when it is whole.

    Args:
        config: The options; saved beside the adapter.
        model: With gradients where they are wanted: what ``apply_peft`` returned.
        tokenizer: Saved beside the adapter.
        train_set: What to train on.
        val_set: What to measure the loss on, before and after.
        title: What progress calls the training.
        console: Where progress is shown; the terminal's error stream if not given.

    Returns:
        Losses per learned token, perplexities, tokens per second and times.
    """
    collator = Collator(tokenizer.pad_token_id)
    metrics: dict[str, float] = {}
    if val_set:
        metrics["eval_loss_before"] = evaluate(model, val_set, collator, config.val_batch_size)
    with _replaced(config.output_dir, config.overwrite) as folder:
        with _use_cache_restored(model):
            trainer = _trainer(config, model, train_set, collator, folder)
            # No tqdm, and no line of raw numbers instead of it.
            trainer.pop_callback(PrinterCallback)
            trainer.add_callback(ProgressCallback(title, console))
            start = time.perf_counter()
            trained = trainer.train()
        seconds = time.perf_counter() - start
        metrics |= {
            "train_loss": float(trained.training_loss),
            "train_steps": float(trainer.state.global_step),
            "train_seconds": seconds,
            "train_tokens_per_second": float(trainer.state.num_input_tokens_seen) / seconds,
        }
        if val_set:
            metrics["eval_loss"] = evaluate(model, val_set, collator, config.val_batch_size)
            metrics["perplexity_before"] = perplexity(metrics["eval_loss_before"])
            metrics["perplexity"] = perplexity(metrics["eval_loss"])
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write(config, folder / CONFIG_FILE)
        (folder / METRICS_FILE).write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    return metrics


def evaluate(model: Any, examples: list[Example], collator: Collator, batch_size: int) -> float:
    """Return the mean loss of all learned tokens of ``examples``, whatever the batches.

    Returns:
        The loss; NaN if nothing is learned in ``examples``.
    """
    total, count = 0.0, 0
    was_training = model.training
    model.eval()
    # Examples of alike length share a batch, so that little padding is computed.
    ordered = sorted(examples, key=lambda e: len(e.input_ids))
    with torch.inference_mode():
        for i in range(0, len(ordered), batch_size):
            batch = {name: t.to(model.device) for name, t in collator(ordered[i : i + batch_size]).items()}
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, -labels.shape[1] - 1 : -1].float()
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
            ).item()
            count += int((labels != IGNORED).sum())
    model.train(was_training)
    return total / count if count else math.nan


def perplexity(loss: float) -> float:
    """Return ``exp(loss)``, infinite where that is too large."""
    return math.exp(loss) if loss < 700 else math.inf


def _trainer(config: TrainConfig, model: Any, train_set: list[Example], collator: Collator, folder: Path) -> Trainer:
    per_step = config.train_batch_size * config.gradient_accumulation_steps
    steps = config.max_train_step or config.num_epochs * math.ceil(len(train_set) / per_step)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        num_train_epochs=config.num_epochs,
        max_steps=config.max_train_step or -1,
        learning_rate=config.lr,
        lr_scheduler_type=config.lr_schedule if config.lr_schedule != "constant" else "constant_with_warmup",
        warmup_steps=math.ceil(steps * config.warmup_ratio),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        logging_steps=max(1, steps // _LINES),
        logging_strategy="steps",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        include_num_input_tokens_seen="non_padding",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    # A list serves as a dataset: it has a length and indices.
    return Trainer(model=model, args=arguments, train_dataset=train_set, data_collator=collator)


@contextmanager
def _use_cache_restored(model: Any) -> Iterator[None]:
    """Undo that the Trainer switches the KV cache off in the config, which is saved with the model."""
    before = model.config.use_cache
    try:
        yield
    finally:
        model.config.use_cache = before


@contextmanager
def _replaced(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a folder aside that becomes ``folder``, in place of an older one if ``overwrite``."""
    old = folder.with_name(f".old-{folder.name}")
    with written_aside(folder) as aside:
        yield aside
        if overwrite and folder.is_dir():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
    shutil.rmtree(old, ignore_errors=True)
