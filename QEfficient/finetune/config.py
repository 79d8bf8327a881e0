# SPDX-License-Identifier: BSD-3-Clause
"""The options of fine-tuning: declared once, read from the command line, a file or keywords.

Knows neither PyTorch nor PEFT, so that ``--help`` is fast; what only PEFT knows is checked in ``model``.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from QEfficient.errors import ConfigError
from QEfficient.options import from_dict, make_parser, option

CONFIG_FILE = "train_config.yaml"
"""The resolved options, beside the adapter that they made."""

MIN_CONTEXT = 8


@dataclass(slots=True, kw_only=True)
class TrainConfig:
    """Train an adapter for a causal language model; save it in PEFT's format.

    Values come from ``--config FILE`` first, and from the other options over it.
    """

    config: Path | None = option(None, "YAML or JSON file of these options.", metavar="FILE")
    model_name: str = option("", "Base model: a folder, or an id on the Hugging Face Hub.")
    tokenizer_name: str | None = option(None, "Tokenizer's folder or Hub id, if not the base's.")
    train_file: Path | None = option(None, "Training data: one JSON object a line.", metavar="FILE")
    val_file: Path | None = option(None, "Validation data; never trained on.", metavar="FILE")
    data_format: str = option(
        "auto",
        "What the lines hold: text; prompt and completion; instruction, input and output; chat messages.",
        choices=("auto", "text", "completion", "instruction", "messages"),
    )
    output_dir: Path = option(Path("training_results"), "Folder that becomes the adapter.", metavar="DIR")
    overwrite: bool = option(False, "Replace output_dir when training has succeeded.")

    context_length: int = option(512, "Tokens of an example; longer ones are cut, the prompt first.")
    train_batch_size: int = option(1, "Examples of one forward pass.")
    val_batch_size: int = option(1, "Examples of one forward pass in validation.")
    gradient_accumulation_steps: int = option(4, "Forward passes of one optimizer step.")
    num_epochs: int = option(1, "Passes over the training data.")
    max_train_step: int = option(0, "Optimizer steps at most; 0: no limit.")
    lr: float = option(3e-4, "Peak learning rate.")
    lr_schedule: str = option(
        "linear", "How the learning rate falls after the warm-up.", choices=("linear", "cosine", "constant")
    )
    warmup_ratio: float = option(0.03, "Share of the steps in which the learning rate rises.")
    weight_decay: float = option(0.0, "Decay of the weights.")
    max_grad_norm: float = option(1.0, "Length at which gradients are clipped; 0: not clipped.")
    seed: int = option(42, "Seed of the adapter's initial values and of the data's order.")
    dtype: str = option("float32", "Type of the base's weights.", choices=("float32", "bfloat16", "float16"))

    use_peft: bool = option(True, "Train an adapter; otherwise train the base itself.")
    peft_method: str = option("lora", "PEFT's name of the method: lora, ia3, oft, prompt_tuning, …")
    peft_config_file: Path | None = option(
        None, "YAML or JSON file of the method's fields, or a saved adapter_config.json.", metavar="FILE"
    )
    lora_r: int | None = option(None, "LoRA's rank.")
    lora_alpha: int | None = option(None, "LoRA's alpha; the update is scaled by alpha / rank.")
    lora_dropout: float | None = option(None, "Dropout before LoRA's matrices.")
    use_rslora: bool | None = option(None, "Scale by alpha / sqrt(rank).")
    use_dora: bool | None = option(None, "Train magnitude and direction apart (DoRA).")
    target_modules: list[str] = option([], "Module to adapt; repeat it, or separate by commas.", metavar="NAME")
    feedforward_modules: list[str] = option([], "Of these modules IA3 scales the input.", metavar="NAME")
    modules_to_save: list[str] = option([], "Module to train and save whole.", metavar="NAME")


# What must hold, and what to say otherwise: everything that can be known without a model.
_RULES: tuple[tuple[Callable[[TrainConfig], bool], str], ...] = (
    (lambda c: bool(c.model_name.strip()), "model_name is missing: name a folder or a Hub id"),
    (lambda c: c.train_file is not None, "train_file is missing: name a JSONL file"),
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
        lambda c: c.train_file is None or c.val_file is None or c.train_file.resolve() != c.val_file.resolve(),
        "val_file and train_file are the same file, {c.val_file}: a validation on training data says nothing",
    ),
)

_LORA_ONLY = ("lora_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
_IA3_ONLY = ("feedforward_modules",)
_PEFT_ONLY = (*_LORA_ONLY, *_IA3_ONLY, "target_modules", "modules_to_save", "peft_config_file")


def check(config: TrainConfig) -> None:
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
            raise ConfigError(f"{name} {str(path)!r} is not a file")
    output = config.output_dir
    if output.is_file():
        raise ConfigError(f"output_dir {str(output)!r} is a file")
    if output.is_dir() and any(output.iterdir()) and not config.overwrite:
        raise ConfigError(f"output_dir {str(output)!r} is not empty: choose another, or give --overwrite")


def check_method(config: TrainConfig) -> None:
    """Refuse options of one PEFT method together with another method, or with none.

    Raises:
        ConfigError: Names the option and the method.
    """
    given = [name for name in _PEFT_ONLY if getattr(config, name) not in (None, [])]
    if not config.use_peft and given:
        raise ConfigError(f"{given[0]} is given, but use_peft is false: leave one of them out")
    if config.peft_config_file is not None:
        return  # the file names the method; model.py checks the options against it
    method = config.peft_method.lower()
    for names, owner in ((_LORA_ONLY, "lora"), (_IA3_ONLY, "ia3")):
        foreign = [name for name in given if name in names and method != owner]
        if foreign:
            raise ConfigError(f"{foreign[0]} belongs to peft_method {owner!r}, not to {config.peft_method!r}")


def resolve(source: str, **values: Any) -> TrainConfig:
    """Return the configuration of ``values``, over those of the file ``values["config"]``, checked.

    Args:
        source: Where the values come from; named in errors.
        **values: Fields of :class:`TrainConfig`.

    Raises:
        ConfigError: A field is unknown (with a suggestion), has a wrong value, or contradicts another.
    """
    config = from_dict(TrainConfig, values, source=source)  # names the right source in an error
    if config.config is not None:
        from_file = read_mapping(config.config)
        from_dict(TrainConfig, from_file, source=str(config.config))
        config = from_dict(TrainConfig, {**from_file, **values}, source=source)
    for name in ("target_modules", "feedforward_modules", "modules_to_save"):
        parts = [part.strip() for text in getattr(config, name) for part in text.split(",")]
        setattr(config, name, [part for part in parts if part])
    check(config)
    return config


def parse_args(argv: Sequence[str], *, prog: str) -> TrainConfig:
    """Return the checked configuration of a command line; ``--help`` prints the options and exits.

    Raises:
        ConfigError: As :func:`resolve`.
    """
    return resolve(prog, **vars(make_parser(TrainConfig, prog=prog).parse_args(list(argv))))


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON file; ``lora-r`` reads as ``lora_r``.

    Raises:
        ConfigError: There is no such file, it has another suffix, or it holds no mapping.
    """
    if path.suffix not in {".yaml", ".yml", ".json"}:
        raise ConfigError(f"{path}: a configuration file ends in .yaml, .yml or .json")
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such configuration file")
    try:
        content = path.read_text(encoding="utf-8")
        values = json.loads(content) if path.suffix == ".json" else yaml.safe_load(content)
    except (ValueError, yaml.YAMLError) as e:
        raise ConfigError(f"{path}: not valid {path.suffix[1:].upper()}: {' '.join(str(e).split())}") from e
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold names and values, not {type(values).__name__}")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def write(config: TrainConfig, path: Path) -> None:
    """Write a file that gives the same training again with ``--config``."""
    values = {name: value for name, value in dataclasses.asdict(config).items() if name != "config"}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    path.write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")
