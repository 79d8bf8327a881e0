# SPDX-License-Identifier: BSD-3-Clause
"""One training, from a model and examples to a folder that is whole. Knows no files of data."""

import json
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PrinterCallback

from QEfficient.errors import ArtifactError, ConfigError
from QEfficient.finetune import checkpoints, preflight
from QEfficient.finetune.allocator import memory_kept, peak_memory_bytes
from QEfficient.finetune.batches import ClassCollator, Collator, Rows
from QEfficient.finetune.classes import CLASSES_FILE
from QEfficient.finetune.config import CONFIG_FILE, TrainConfig, write
from QEfficient.finetune.data import Example, digest
from QEfficient.finetune.determinism import deterministic
from QEfficient.finetune.evaluation import evaluate, perplexity, score
from QEfficient.finetune.model import count_parameters, tasks_of
from QEfficient.finetune.progress import ProgressCallback, StopCallback
from QEfficient.finetune.summary import write_summary
from QEfficient.finetune.trainer import AdapterTrainer, per_step
from QEfficient.store import record_adapter, written_aside

__all__ = ["LOG_FILE", "METRICS_FILE", "Interrupted", "ProgressCallback", "evaluate", "perplexity", "train"]

METRICS_FILE = "train_metrics.json"
"""What :func:`train` returned, beside the adapter."""

RUNS = "runs"
"""TensorBoard's files: beside the checkpoints while training, then beside the adapter."""

LOG_FILE = "train_log.json"
"""Loss, learning rate and gradient norm of each optimizer step, and each validation."""


class Interrupted(KeyboardInterrupt):
    """A training was asked to stop, and has written a checkpoint.

    Attributes:
        exit_code: What a shell expects of a process that such a signal ended.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


def train(
    config: TrainConfig,
    model: Any,
    tokenizer: Any,
    train_set: Sequence[Example],
    val_set: Sequence[Example] | None = None,
    *,
    classes: Sequence[str] = (),
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
        classes: Names of the classes, if the model is a classifier.
        title: What progress calls the training.
        console: Where progress is shown; the terminal's error stream if not given.

    Returns:
        Losses per learned token, perplexities (of a classifier: accuracy and F1), tokens per second, times, memory and numbers of parameters.

    Raises:
        ConfigError: There are checkpoints of another training, or of this one and it is not said what to do with them.
        Interrupted: It was asked to stop; ``resume`` goes on.
    """
    refuse_leftovers(config)
    console = console or Console(stderr=True)
    metrics: dict[str, float] = {}
    with memory_kept(), deterministic(config.deterministic), _use_cache_restored(model):
        trainer, checkpoint = _prepared(config, model, tokenizer, train_set, val_set or [], len(classes), console)
        if val_set:
            before = score(model, val_set, tokenizer.pad_token_id, config.val_batch_size, classes=len(classes))
        _run(trainer, checkpoint, title, console)
    if config.keep_best:
        metrics["best_step"] = float(_best_loaded(trainer, console))
    metrics |= _measured(trainer, model)
    if val_set:
        after = score(model, val_set, tokenizer.pad_token_id, config.val_batch_size, classes=len(classes))
        for name, value in after.items():
            key = "eval_loss" if name == "loss" else name
            metrics |= {f"{key}_before": before[name], key: value}
    if classes:
        metrics["classes"] = float(len(classes))
    state = trainer.whole_state()
    if trainer.is_world_process_zero():
        with _replaced(config.output_dir, config.overwrite) as folder:
            model.save_pretrained(folder, state_dict=state)
            if config.use_peft:
                record_adapter(folder)
            if classes:
                (folder / CLASSES_FILE).write_text(json.dumps(list(classes)) + "\n", encoding="utf-8")
            _write(folder, config, model, tokenizer, metrics, trainer.state.log_history)
            if (trainer.root / RUNS).is_dir():
                shutil.copytree(trainer.root / RUNS, folder / RUNS)
        shutil.rmtree(trainer.root, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return metrics


def refuse_leftovers(config: TrainConfig) -> None:
    """Do not silently throw away what an interrupted training has reached.

    Raises:
        ConfigError: There are checkpoints, and neither ``resume`` nor ``overwrite`` was given.
    """
    root = checkpoints.folder_for(config.output_dir)
    if checkpoints.listed(root) and not (config.resume or config.overwrite):
        raise ConfigError(
            f"{root} holds checkpoints of an interrupted training: go on with --resume, or start anew with --overwrite"
        )


def _prepared(
    config: TrainConfig,
    model: Any,
    tokenizer: Any,
    train_set: Sequence[Example],
    val_set: Sequence[Example],
    classes: int,
    console: Any,
) -> tuple[AdapterTrainer, Path | None]:
    """Return the trainer, and the checkpoint to go on from."""
    rows = Rows(train_set, per_step(config), context_length=config.context_length if config.packing else 0)
    pad = tokenizer.pad_token_id
    tasks = tasks_of(model)
    preflight.check_tasks(tasks, [*train_set, *val_set] if tasks else [], packing=config.packing)
    if config.gradient_checkpointing:
        preflight.check_recomputing(model)
    collator = ClassCollator(pad) if classes else Collator(pad, packed=config.packing, tasks=tasks)
    root, made_by = checkpoints.folder_for(config.output_dir), checkpoints.facts(config, digest(train_set))
    checkpoint = None
    if config.resume:
        checkpoint, damages = checkpoints.newest(root, made_by)
        for damage in damages:
            console.print(f"{damage}: going back to the checkpoint before it", style="yellow", soft_wrap=True)
        where = (
            f"from step {checkpoints.step_of(checkpoint)}" if checkpoint else "from the beginning: no whole checkpoint"
        )
        console.print(f"resuming {where}", highlight=False)
    trainer = AdapterTrainer(config, model, rows, collator, val_set, root=root, made_by=made_by, classes=classes)
    if isinstance(collator, Collator) and collator.packed:
        preflight.check_packing(model, rows, collator)  # with the attention of the device that it is trained on
    if trainer.is_world_process_zero() and not config.resume:
        shutil.rmtree(root, ignore_errors=True)
    return trainer, checkpoint


def _run(trainer: AdapterTrainer, checkpoint: Path | None, title: str, console: Console) -> None:
    # No tqdm, and no line of raw numbers instead of it.
    trainer.pop_callback(PrinterCallback)
    stop = StopCallback()
    trainer.add_callback(stop)
    trainer.add_callback(ProgressCallback(title, console))
    stop.listen()
    try:
        trainer.run(checkpoint)
    finally:
        stop.restore()
    if stop.stopped and trainer.state.global_step < trainer.state.max_steps:
        step, name = trainer.state.global_step, signal.Signals(stop.stopped).name
        raise Interrupted(
            f"{name} after step {step} of {trainer.state.max_steps}; the same command with --resume goes on",
            stop.stopped,
        )


def _best_loaded(trainer: AdapterTrainer, console: Console) -> int:
    """Put the best step's weights into the model; return that step, or the last if its checkpoint is gone.

    A training that ran to its end must not be lost because of one file.
    """
    try:
        return trainer.load_best()
    except ArtifactError as e:
        damage = str(e).removesuffix("; export again.")
        console.print(f"the best step cannot be saved: {damage}: saving the last", style="yellow", soft_wrap=True)
        return int(trainer.state.global_step)


def _measured(trainer: AdapterTrainer, model: Any) -> dict[str, float]:
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    seconds = max((entry["seconds"] for entry in history), default=0.0)
    trained, total = count_parameters(model)
    return {
        "train_loss": sum(losses) / len(losses) if losses else float("nan"),
        "train_steps": float(trainer.state.global_step),
        "train_seconds": seconds,
        "train_tokens_per_second": float(trainer.state.num_input_tokens_seen) / max(seconds, 1e-9),
        "trained_parameters": float(trained),
        "parameters": float(total),
        "parameters_per_process": float(trainer.sharding.local if trainer.sharding else total),
        "peak_memory_bytes": float(peak_memory_bytes()),
        "processes": float(trainer.args.world_size),
    }


def _write(
    folder: Path, config: TrainConfig, model: Any, tokenizer: Any, metrics: dict[str, float], history: list[Any]
) -> None:
    tokenizer.save_pretrained(folder)
    write(config, folder / CONFIG_FILE)
    if config.save_metrics:
        (folder / METRICS_FILE).write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
        (folder / LOG_FILE).write_text(json.dumps(history) + "\n", encoding="utf-8")
        peft_type = model.peft_config[model.active_adapter].peft_type if config.use_peft else "full"
        write_summary(folder, config, metrics, history, str(getattr(peft_type, "value", peft_type)))


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
