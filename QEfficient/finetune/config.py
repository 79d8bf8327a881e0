# SPDX-License-Identifier: BSD-3-Clause
"""The options of fine-tuning: declared once, read from the command line, a file or keywords.

Knows neither PyTorch nor PEFT, so that ``--help`` is fast; what only PEFT knows is checked in ``model``.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from QEfficient.errors import ConfigError
from QEfficient.finetune import rules
from QEfficient.options import from_dict, make_parser, option

CONFIG_FILE = "train_config.yaml"
"""The resolved options, beside the adapter that they made."""


@dataclass(slots=True, kw_only=True)
class TrainConfig:
    """Train an adapter for a causal language model; save it in PEFT's format.

    Values come from ``--config FILE`` first, and from the other options over it.
    """

    config: Path | None = option(None, "YAML or JSON file of these options.", metavar="FILE")
    model_name: str = option("", "Base model: a folder, or an id on the Hugging Face Hub.")
    tokenizer_name: str | None = option(None, "Tokenizer's folder or Hub id, if not the base's.")
    train_file: Path | None = option(None, "Training data: .jsonl, .csv or .parquet.", metavar="FILE")
    val_file: Path | None = option(None, "Validation data; never trained on.", metavar="FILE")
    dataset: str | None = option(None, "Instead of train_file: folder or Hub id that the datasets library loads.")
    dataset_config: str | None = option(None, "Configuration of the dataset, if it has several.", metavar="NAME")
    dataset_split: str = option("train", "Split of the dataset to train on.")
    val_dataset_split: str | None = option(None, "Split of the dataset to validate on.")
    val_share: float = option(0.0, "Share of the training data that is held out for validation instead.")
    preprocess: str | None = option(
        None,
        "Function that turns a row into one of a known format, or None to leave it out.",
        metavar="FILE.py:FUNCTION",
    )
    streaming: bool = option(False, "Leave rows on disk and read one when its turn comes, for data larger than memory.")
    task_mode: str = option(
        "generation",
        "What is learned: to go on with a text, or which of some labels a text has (rows of text and label).",
        choices=("generation", "seq_classification"),
    )
    data_format: str = option(
        "auto",
        "What the lines hold: text; prompt and completion; instruction, input and output; chat messages.",
        choices=("auto", "text", "completion", "instruction", "messages"),
    )
    output_dir: Path = option(Path("training_results"), "Folder that becomes the adapter.", metavar="DIR")
    overwrite: bool = option(False, "Replace output_dir when training has succeeded.")
    save_steps: int = option(0, "Write a checkpoint every so many optimizer steps; 0: only when interrupted.")
    keep_checkpoints: int = option(2, "Newest checkpoints that are kept, besides the best.")
    resume: bool = option(False, "Go on from the newest whole checkpoint, if there is one.")
    save_metrics: bool = option(True, "Write metrics, log, summary and model card beside the adapter.")
    report_to: list[str] = option(
        [], "Tracker the losses also go to, may be repeated: tensorboard where it is installed, unless told; none."
    )
    test: bool = option(False, "Run qefficient test on the adapter afterwards.")

    context_length: int = option(512, "Tokens of an example; longer ones are cut, the prompt first.")
    packing: bool = option(False, "Fill rows with several examples, which do not see each other, instead of padding.")
    group_by_length: bool = option(False, "Let examples of alike length share a batch.")
    show_example: bool = option(True, "Print an example before training, with what is learned marked.")
    train_batch_size: int = option(
        1, "Examples of one forward pass; with several processes, they share batch times accumulation."
    )
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
    gradient_checkpointing: bool = option(False, "Compute activations again in the backward pass, to save memory.")
    neftune_alpha: float = option(0.0, "Noise added to embeddings while training (NEFTune); 0: none.")
    eval_steps: int = option(0, "Validate every so many optimizer steps; 0: only before and after.")
    keep_best: bool = option(False, "Save the step with the lowest validation loss, instead of the last.")
    early_stopping: int = option(0, "Stop after so many validations without a lower loss; 0: never.")
    fsdp: bool = option(
        False, "Shard parameters over processes (FSDP2); needs torchrun, accelerate launch or --engine ray."
    )
    engine: str = option(
        "local",
        "local: in this process, or those of torchrun; ray: in workers of a Ray cluster that runs.",
        choices=("local", "ray"),
    )
    workers: int = option(1, "Processes of the Ray cluster, with --engine ray; they share a step's examples.")
    worker_cpus: int = option(1, "Processors of each of them.")
    ray_address: str = option(
        "", "Ray cluster to train on; default: that of RAY_ADDRESS, or of this machine.", metavar="ADDRESS"
    )
    seed: int = option(42, "Seed of the adapter's initial values and of the data's order.")
    deterministic: bool = option(
        False, "Compute on a GPU the same each time, to the bit, at the cost of speed; on a CPU that is so anyway."
    )
    dtype: str = option("float32", "Type of the base's weights.", choices=("float32", "bfloat16", "float16"))
    quantization: str = option(
        "none",
        "Keep the frozen base in fewer bits: 4 (NF4, as in QLoRA) or 8 with bitsandbytes, 8 with torchao.",
        choices=("none", "bnb-4bit", "bnb-8bit", "torchao-int8"),
    )

    use_peft: bool = option(True, "Train an adapter; otherwise train the base itself.")
    peft_method: str = option("lora", "PEFT's name of the method: lora, ia3, oft, prompt_tuning, …")
    peft_config_file: Path | None = option(
        None, "YAML or JSON file of the method's fields, or a saved adapter_config.json.", metavar="FILE"
    )
    from_peft_checkpoint: Path | None = option(None, "Adapter to go on from, instead of a new one.", metavar="DIR")
    lora_r: int | None = option(None, "LoRA's rank.")
    lora_alpha: int | None = option(None, "LoRA's alpha; the update is scaled by alpha / rank.")
    lora_dropout: float | None = option(None, "Dropout before LoRA's matrices.")
    use_rslora: bool | None = option(None, "Scale by alpha / sqrt(rank).")
    use_dora: bool | None = option(None, "Train magnitude and direction apart (DoRA).")
    target_modules: list[str] = option([], "Module to adapt; repeat it, or separate by commas.", metavar="NAME")
    feedforward_modules: list[str] = option([], "Of these modules IA3 scales the input.", metavar="NAME")
    modules_to_save: list[str] = option([], "Module to train and save whole.", metavar="NAME")

    @property
    def validates(self) -> bool:
        """Tell whether there is something to validate on."""
        return bool(self.val_file or self.val_dataset_split or self.val_share)


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
    for name in ("target_modules", "feedforward_modules", "modules_to_save", "report_to"):
        parts = [part.strip() for text in getattr(config, name) for part in text.split(",")]
        setattr(config, name, [part for part in parts if part])
    rules.check(config)
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
