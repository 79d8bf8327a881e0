# SPDX-License-Identifier: BSD-3-Clause
"""What must hold between the options of fine-tuning, before a model is loaded. Knows no PyTorch."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from QEfficient.errors import ConfigError

if TYPE_CHECKING:
    from QEfficient.finetune.config import TrainConfig

MIN_CONTEXT = 8
JSONL = (".jsonl", ".json", ".ndjson")

# What must hold, and what to say otherwise: everything that can be known without a model.
_RULES: tuple[tuple[Callable[["TrainConfig"], object], str], ...] = (
    (lambda c: bool(c.model_name.strip()), "model_name is missing: name a folder or a Hub id"),
    (lambda c: c.train_file or c.dataset, "train_file is missing: name a .jsonl, .csv or .parquet file, or a dataset"),
    (lambda c: not (c.train_file and c.dataset), "train_file and dataset are both given: leave one of them out"),
    (lambda c: c.dataset or not c.val_dataset_split, "val_dataset_split is given without a dataset"),
    (lambda c: 0 <= c.val_share < 1, "val_share must be at least 0 and below 1, not {c.val_share}"),
    (
        lambda c: bool(c.val_share) + bool(c.val_file) + bool(c.val_dataset_split) <= 1,
        "val_file, val_dataset_split and val_share exclude each other: give one of them",
    ),
    (
        lambda c: not c.val_dataset_split or c.val_dataset_split != c.dataset_split,
        "val_dataset_split and dataset_split are both {c.dataset_split!r}: a validation on training data says nothing",
    ),
    (
        lambda c: not (c.packing and c.group_by_length),
        "packing leaves no padding for group_by_length to save: choose one",
    ),
    (
        lambda c: not (c.streaming and (c.packing or c.group_by_length or c.val_share)),
        "streaming keeps no lengths and no rows: leave packing, group_by_length and val_share out",
    ),
    (lambda c: c.workers >= 1, "workers must be 1 or more, not {c.workers}"),
    (lambda c: c.worker_cpus >= 1, "worker_cpus must be 1 or more, not {c.worker_cpus}"),
    (
        lambda c: c.engine == "ray" or (c.workers == c.worker_cpus == 1 and not c.ray_address),
        "workers, worker_cpus and ray_address belong to engine ray: give it, or start processes with torchrun",
    ),
    (lambda c: c.dataset or not c.dataset_config, "dataset_config is given without a dataset"),
    (
        lambda c: c.task_mode == "generation" or not (c.packing or c.streaming or c.data_format != "auto" or c.test),
        "task_mode {c.task_mode!r} is trained on text and label: leave packing, streaming, data_format and test out",
    ),
    (lambda c: c.save_steps >= 0, "save_steps must be 0 (off) or more, not {c.save_steps}"),
    (lambda c: c.eval_steps >= 0, "eval_steps must be 0 (off) or more, not {c.eval_steps}"),
    (lambda c: c.keep_checkpoints >= 1, "keep_checkpoints must be 1 or more, not {c.keep_checkpoints}"),
    (lambda c: c.neftune_alpha >= 0, "neftune_alpha must be 0 or more, not {c.neftune_alpha}"),
    (lambda c: c.early_stopping >= 0, "early_stopping must be 0 (never) or more, not {c.early_stopping}"),
    (
        lambda c: c.eval_steps or not (c.keep_best or c.early_stopping),
        "keep_best and early_stopping compare validations: give eval_steps",
    ),
    (
        lambda c: not c.eval_steps or c.validates,
        "eval_steps is given, but there is nothing to validate on: give val_file",
    ),
    (
        lambda c: c.use_peft or not c.from_peft_checkpoint,
        "from_peft_checkpoint is given, but use_peft is false: leave one of them out",
    ),
    (
        lambda c: c.use_peft or not c.test,
        "test holds adapters against their base: leave it out, or train an adapter",
    ),
    (lambda c: c.train_batch_size >= 1, "train_batch_size must be 1 or more, not {c.train_batch_size}"),
    (lambda c: c.val_batch_size >= 1, "val_batch_size must be 1 or more, not {c.val_batch_size}"),
    (
        lambda c: c.gradient_accumulation_steps >= 1,
        "gradient_accumulation_steps must be 1 or more, not {c.gradient_accumulation_steps}",
    ),
    (lambda c: c.num_epochs >= 1, "num_epochs must be 1 or more, not {c.num_epochs}"),
    (lambda c: c.max_train_step >= 0, "max_train_step must be 0 (no limit) or more, not {c.max_train_step}"),
    (
        lambda c: c.context_length >= MIN_CONTEXT,
        f"context_length must be {MIN_CONTEXT} or more, not {{c.context_length}}",
    ),
    (lambda c: 0 < c.lr < float("inf"), "lr must be above 0, not {c.lr}"),
    (lambda c: 0 <= c.warmup_ratio < 1, "warmup_ratio must be at least 0 and below 1, not {c.warmup_ratio}"),
    (lambda c: c.weight_decay >= 0, "weight_decay must be 0 or more, not {c.weight_decay}"),
    (lambda c: c.max_grad_norm >= 0, "max_grad_norm must be 0 or more, not {c.max_grad_norm}"),
    (lambda c: c.lora_r is None or c.lora_r >= 1, "lora_r must be 1 or more, not {c.lora_r}"),
    (
        lambda c: c.lora_dropout is None or 0 <= c.lora_dropout < 1,
        "lora_dropout must be at least 0 and below 1, not {c.lora_dropout}",
    ),
    (
        lambda c: c.dtype == "float32" or c.use_peft,
        "dtype {c.dtype} would train the base itself in low precision: use float32, or train an adapter",
    ),
    (
        lambda c: c.quantization == "none" or (c.use_peft and not c.fsdp),
        "quantization {c.quantization} is for a frozen base that every process holds whole: train an adapter, without fsdp",
    ),
    (
        lambda c: c.train_file is None or c.val_file is None or c.train_file.resolve() != c.val_file.resolve(),
        "val_file and train_file are the same file, {c.val_file}: a validation on training data says nothing",
    ),
)

_LORA_ONLY = ("lora_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
_IA3_ONLY = ("feedforward_modules",)
_PEFT_ONLY = (*_LORA_ONLY, *_IA3_ONLY, "target_modules", "modules_to_save", "peft_config_file")


def check(config: "TrainConfig") -> None:
    """Refuse values that are out of range or contradict each other, before any model is loaded.

    Raises:
        ConfigError: Names the field, its value and what is allowed.
    """
    for holds, message in _RULES:
        if not holds(config):
            raise ConfigError(message.format(c=config))
    check_method(config)
    for name in ("train_file", "val_file"):
        path = getattr(config, name)
        if path is not None and not path.is_file():
            hint = ": name a file in it, or give it as dataset" if path.is_dir() else ""
            raise ConfigError(f"{name} {str(path)!r} is not a file{hint}")
    if config.dataset and Path(config.dataset).expanduser().is_file():
        raise ConfigError(f"dataset {config.dataset!r} is a file: give it as train_file")
    checkpoint = config.from_peft_checkpoint
    if checkpoint is not None and not (checkpoint / "adapter_config.json").is_file():
        raise ConfigError(f"from_peft_checkpoint {str(checkpoint)!r} is no adapter: it has no adapter_config.json")
    output = config.output_dir
    if output.is_file():
        raise ConfigError(f"output_dir {str(output)!r} is a file")
    if output.is_dir() and any(output.iterdir()) and not config.overwrite:
        raise ConfigError(f"output_dir {str(output)!r} is not empty: choose another, or give --overwrite")


def check_method(config: "TrainConfig") -> None:
    """Refuse options of one PEFT method together with another method, or with none.

    Raises:
        ConfigError: Names the option and the method.
    """
    given = [name for name in _PEFT_ONLY if getattr(config, name) not in (None, [])]
    if not config.use_peft and given:
        raise ConfigError(f"{given[0]} is given, but use_peft is false: leave one of them out")
    if config.from_peft_checkpoint is not None and given:
        raise ConfigError(f"{given[0]} is given, but from_peft_checkpoint has decided it: leave one of them out")
    if config.peft_config_file is not None:
        return  # the file names the method; model.py checks the options against it
    method = config.peft_method.lower()
    for names, owner in ((_LORA_ONLY, "lora"), (_IA3_ONLY, "ia3")):
        foreign = [name for name in given if name in names and method != owner]
        if foreign:
            raise ConfigError(f"{foreign[0]} belongs to peft_method {owner!r}, not to {config.peft_method!r}")
