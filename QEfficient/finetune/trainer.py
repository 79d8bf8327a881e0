# SPDX-License-Identifier: BSD-3-Clause
"""transformers' ``Trainer`` with what it lacks: whole checkpoints, losses per token, an order that survives a resume."""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from peft.tuners.lora import LoraLayer
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations

from QEfficient.errors import ConfigError
from QEfficient.finetune import checkpoints
from QEfficient.finetune.batches import ClassCollator, Collator, EpochOrder, Rows
from QEfficient.finetune.config import TrainConfig
from QEfficient.finetune.data import Example
from QEfficient.finetune.evaluation import class_loss, score
from QEfficient.finetune.learned import chooses_logits, learned_only
from QEfficient.finetune.sharding import ShardedCallback, choose_fsdp


class AdapterTrainer(Trainer):
    """Trains on :class:`Rows`; checkpoints go to ``root``.

    Attributes:
        root: Folder of the checkpoints.
        made_by: What a checkpoint must agree with to be gone on from.
        sharding: What makes sure that parameters are sharded, if they shall be.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Any,
        rows: Rows,
        collator: Collator | ClassCollator,
        val_set: Sequence[Example],
        *,
        root: Path,
        made_by: dict[str, Any],
        classes: int = 0,
    ) -> None:
        arguments = training_arguments(config, len(rows), root)
        self.root, self.made_by, self._config, self._val_set = root, made_by, config, val_set
        self._classes = classes
        self._aside, self._pad_token_id = root / ".tmp", collator.pad_token_id
        self._started, self._seconds_before = time.perf_counter(), 0.0
        self.order = EpochOrder(rows, per_step(config), config.seed, by_length=config.group_by_length)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=[[e] for e in val_set] or None,
            data_collator=collator,
            compute_loss_func=class_loss if classes else None,
        )
        with suppress(OSError):
            root.rmdir()  # made already, but wanted with the first checkpoint
        # By now the model is where it is trained, unless it is to be sharded first.
        self._chooses = isinstance(collator, Collator) and chooses_logits(model, rows, collator)
        self.add_callback(_EpochCallback(self.order, len(rows) // per_step(config)))
        self.sharding = ShardedCallback() if config.fsdp else None
        if self.sharding:
            self.add_callback(self.sharding)
        if config.keep_best or config.early_stopping:
            self.add_callback(BestCallback(config.early_stopping))

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator, with FSDP where it was asked for."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp_plugin_args is not None:
            choose_fsdp(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def whole_state(self) -> dict[str, torch.Tensor] | None:
        """Gather the sharded parameters in the first process; all take part. None if they are not sharded."""
        return self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute no logits for nothing; drop the mask of packed rows, which transformers separates by positions only without one."""
        if "position_ids" in inputs:
            inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
        if self._chooses:
            inputs = learned_only(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the loss per learned token, whatever the batches; the stock one is a mean of means."""
        found = score(self.model, self._val_set, self._pad_token_id, self._config.val_batch_size, classes=self._classes)
        metrics = {f"eval_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the seconds trained so far, those before an interruption included."""
        logs["seconds"] = self._seconds_before + time.perf_counter() - self._started
        super().log(logs)  # without the start: speeds are ours to tell

    def run(self, checkpoint: Path | None) -> None:
        """Train, from the beginning or from a checkpoint that was verified."""
        if checkpoint is not None:
            self._seconds_before = _last_seconds(checkpoint)
        self._started = time.perf_counter()
        with _uncast(self.model, self.args.bf16):
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def load_best(self) -> int:
        """Put the weights of the best validation into the model; return its step, or 0 if there was none."""
        best = self._best()
        if best is None or self.state.best_global_step == self.state.global_step:
            return int(self.state.best_global_step or 0)
        checkpoints.verify(best)
        self._load_from_checkpoint(str(best))
        return int(self.state.best_global_step or 0)

    def _best(self) -> Path | None:
        step = self.state.best_global_step
        return self.root / f"{checkpoints.PREFIX}{step}" if step else None

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        return self.order

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Let the Trainer write aside, then seal and move in what it wrote."""
        main = self.is_world_process_zero()
        if main:
            shutil.rmtree(self._aside, ignore_errors=True)
            self._aside.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.state.best_model_checkpoint = str(self._best()) if self._best() else None
        self.accelerator.wait_for_everyone()
        if main:
            written = self._aside / f"{checkpoints.PREFIX}{self.state.global_step}"
            self.state.save_to_json(str(written / "trainer_state.json"))  # now without the path aside
            checkpoints.seal(written, self.root, self.made_by)
            shutil.rmtree(self._aside, ignore_errors=True)
            checkpoints.rotate(self.root, self._config.keep_checkpoints, self._best())
        self.accelerator.wait_for_everyone()


class _EpochCallback(TrainerCallback):
    """Tells the order which epoch begins, counted in steps: it must be right after a resume, too."""

    def __init__(self, order: EpochOrder, steps_per_epoch: int) -> None:
        self._order, self._steps = order, steps_per_epoch

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the epochs that are done."""
        self._order.epoch = state.global_step // self._steps


class BestCallback(TrainerCallback):
    """Has a checkpoint written for each new lowest validation loss; stops when there has been none for a while.

    What it needs to know is in the log, which a checkpoint holds: a resumed training stops where it would have.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare the validation with those before."""
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        best = losses.index(min(losses)) if losses else 0
        if losses and best == len(losses) - 1:
            control.should_save = True
        elif self._patience and len(losses) - 1 - best >= self._patience:
            control.should_training_stop = True


def per_step(config: TrainConfig) -> int:
    """Return how many rows an optimizer step learns from, over all processes."""
    return config.train_batch_size * config.gradient_accumulation_steps


def split_batch(batch: int, accumulation: int, processes: int) -> tuple[int, int]:
    """Return batch and accumulation of each process, so that a step learns from the same rows for any number of them.

    Raises:
        ConfigError: They cannot be shared equally.
    """
    if accumulation % processes == 0:
        return batch, accumulation // processes
    if batch % processes == 0:
        return batch // processes, accumulation
    raise ConfigError(
        f"{processes} processes cannot share train_batch_size {batch} times gradient_accumulation_steps {accumulation}: "
        f"make one of them a multiple of {processes}"
    )


def training_arguments(config: TrainConfig, rows: int, root: Path) -> TrainingArguments:
    """Return the Trainer's arguments of ``config``.

    Raises:
        ConfigError: The processes cannot share the batch, there is only one to shard over, or a tracker is not there.
    """
    steps = config.max_train_step or config.num_epochs * (rows // per_step(config))
    saving = config.save_steps or (steps + 1 if config.keep_best or config.early_stopping else 0)
    sharding: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2}} if config.fsdp else {}
    arguments = TrainingArguments(
        output_dir=str(root),
        num_train_epochs=config.num_epochs,
        max_steps=config.max_train_step or -1,
        learning_rate=config.lr,
        lr_scheduler_type=config.lr_schedule if config.lr_schedule != "constant" else "constant_with_warmup",
        warmup_steps=int(steps * config.warmup_ratio),  # of one step none: its rate would be 0
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        neftune_noise_alpha=config.neftune_alpha or None,
        activation_checkpointing=config.gradient_checkpointing,
        bf16=autocasts(config),
        seed=config.seed,
        logging_steps=1,
        logging_strategy="steps",
        eval_strategy="steps" if config.eval_steps else "no",
        eval_steps=config.eval_steps or None,
        metric_for_best_model="eval_loss" if config.keep_best or config.early_stopping else None,
        greater_is_better=False if config.keep_best or config.early_stopping else None,
        save_strategy="steps" if saving else "no",
        save_steps=saving or 1,
        report_to=trackers(config) or "none",
        use_cpu=not torch.accelerator.is_available(),  # unless told, accelerate does not see other processes on CPUs
        disable_tqdm=True,
        remove_unused_columns=False,
        include_num_input_tokens_seen="non_padding",
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        **sharding,
    )
    processes = arguments.world_size
    if config.fsdp and arguments.distributed_state.distributed_type == DistributedType.NO:
        raise ConfigError(
            "fsdp shards over processes, and there is one: start several with torchrun, or give --engine ray and --workers"
        )
    split = split_batch(config.train_batch_size, config.gradient_accumulation_steps, processes)
    arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps = split
    return arguments


def autocasts(config: TrainConfig) -> bool:
    """Tell whether the products of an adapter, which stays float32, are made in bfloat16 as those of its base are.

    GPUs make them several times as fast. accelerate would have FSDP2 keep the base in float32 for it.
    """
    gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return config.dtype == "bfloat16" and gpu and not config.fsdp


def trackers(config: TrainConfig) -> list[str]:
    """Return the trackers that were asked for; TensorBoard if none was and it is installed.

    Raises:
        ConfigError: One is unknown, or its library is not installed.
    """
    available = get_available_reporting_integrations()  # type: ignore[no-untyped-call]
    if config.report_to == ["none"]:
        return []
    missing = set(config.report_to) - set(available)
    if missing:
        raise ConfigError(
            f"report_to {sorted(missing)[0]!r} is unknown to transformers, or its library is not installed"
        )
    return config.report_to or [name for name in ("tensorboard",) if name in available and config.save_metrics]


@contextmanager
def _uncast(model: Any, wanted: bool) -> Iterator[None]:
    """Keep LoRA from making its inputs float32 when autocast makes them bfloat16 again."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)] if wanted else []
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.cast_input_dtype_enabled = True


def _last_seconds(checkpoint: Path) -> float:
    from transformers import TrainerState

    history = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).log_history
    return float(max((entry.get("seconds", 0.0) for entry in history), default=0.0))
