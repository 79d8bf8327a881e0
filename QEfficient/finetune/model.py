# SPDX-License-Identifier: BSD-3-Clause
"""Base, tokenizer and adapter of a training, ready to be trained. Knows PEFT's registry, but no method by itself."""

import dataclasses
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError

from QEfficient.errors import ConfigError
from QEfficient.finetune.config import TrainConfig, read_mapping
from QEfficient.finetune.quantization import keep_trainable, quantized
from QEfficient.finetune.rules import check_method
from QEfficient.options import suggest
from QEfficient.store import is_local

# Options of ours that are fields of a PEFT config; of the same name unless told.
_FIELDS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "target_modules": "target_modules",
    "feedforward_modules": "feedforward_modules",
    "modules_to_save": "modules_to_save",
}
_PADS = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|padding|>", "<unk>", "[UNK]")
_LOADING = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)


def load_model_and_tokenizer(
    train_config: TrainConfig, dataset_config: Any = None, **kwargs: Any
) -> tuple[Any, transformers.PreTrainedTokenizerBase]:
    """Load the base and its tokenizer from folders or the Hub.

    Args:
        train_config: Names both.
        dataset_config: Names of the classes, for a classifier.
        **kwargs: Forwarded to ``from_pretrained`` of the model's Auto class.

    Returns:
        The model, and a tokenizer that has a padding token. Labels are masked by position, never by that token.

    Raises:
        ConfigError: Either cannot be loaded, or they do not belong together.
    """
    name = _checked_name(train_config.model_name, "model_name")
    tokenizer_name = _checked_name(train_config.tokenizer_name or name, "tokenizer_name")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_name)
    except _LOADING as e:
        raise ConfigError(f"no tokenizer can be loaded from {tokenizer_name!r}: {_one_line(e)}") from e
    dtype = getattr(torch, train_config.dtype)
    options = {"dtype": dtype, **quantized(train_config.quantization, dtype), **kwargs}
    classifies = train_config.task_mode == "seq_classification"
    auto: Any = transformers.AutoModelForCausalLM
    if classifies:
        auto = transformers.AutoModelForSequenceClassification
        options = _class_options(dataset_config or []) | options
    try:
        with torch.random.fork_rng():
            torch.manual_seed(train_config.seed)  # a new head is drawn
            model = auto.from_pretrained(name, **options)
    except _LOADING as e:
        kind = "classifier" if classifies else "causal language model"
        raise ConfigError(f"no {kind} can be loaded from {name!r}: {_one_line(e)}") from e
    embeddings: Any = model.get_input_embeddings()
    rows = len(embeddings.weight)
    if len(tokenizer) > rows:
        raise ConfigError(
            f"tokenizer {tokenizer_name!r} has {len(tokenizer)} tokens, but {name!r} embeds only {rows}: name the base's own"
        )
    if not classifies or tokenizer.pad_token_id is None:
        set_pad_token(tokenizer)
    if classifies:
        model.config.pad_token_id = tokenizer.pad_token_id  # by which it finds the end of a text
    return model, tokenizer


def _class_options(classes: Sequence[str]) -> dict[str, Any]:
    names = dict(enumerate(classes))
    numbers = {name: i for i, name in names.items()}
    if not classes:
        return {}
    # A base that tells other classes apart keeps all but its head.
    return {"num_labels": len(classes), "id2label": names, "label2id": numbers, "ignore_mismatched_sizes": True}


def set_pad_token(tokenizer: Any) -> None:
    """Give ``tokenizer`` a padding token, if it has none: a dedicated one of its vocabulary, or else EOS.

    Nothing is added to the vocabulary, because the base has no embedding for it.

    Raises:
        ConfigError: It has no end-of-sequence token, so that a model could not learn to stop.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"tokenizer {tokenizer.name_or_path!r} has no eos_token, so a model could not learn to stop")
    if tokenizer.pad_token_id is None:
        vocabulary = tokenizer.get_vocab()
        tokenizer.pad_token = next((t for t in _PADS if t in vocabulary), tokenizer.eos_token)


def generate_peft_config(train_config: TrainConfig, **kwargs: Any) -> PeftConfig:
    """Return the ``PeftConfig`` of a training, of any method that PEFT knows.

    Values come from ``peft_config_file``, over it the options of ``train_config``, over those ``kwargs``.

    Args:
        train_config: Names the method, or a file that does.
        **kwargs: Fields of the method's config.

    Raises:
        ConfigError: The method or a field is unknown, or a value has the wrong type or is refused by PEFT.
    """
    check_method(train_config)
    path = train_config.peft_config_file
    values = read_mapping(path) if path is not None else {}
    source = str(path) if path is not None else "peft config"
    named = values.pop("peft_type", None)
    asked = train_config.peft_method
    if named is not None and asked.lower() not in ("lora", str(named).lower()):  # the default asks for nothing
        raise ConfigError(f"peft_method is {asked!r}, but {source} says peft_type {named!r}: leave one of them out")
    cls = _config_class(kwargs.pop("peft_type", None) or named or train_config.peft_method, source)
    options = {field: getattr(train_config, name) for name, field in _FIELDS.items()}
    options = {field: value for field, value in options.items() if value not in (None, [])}
    if "peft_version" in values:  # PEFT wrote the file; another version of it may know fields that are empty here
        known = {f.name for f in dataclasses.fields(cls)}
        values = {name: value for name, value in values.items() if name in known or value not in (None, {}, [], False)}
    merged = {**values, **options, **kwargs}
    _check_fields(cls, merged, source)
    merged = {
        "task_type": "SEQ_CLS" if train_config.task_mode == "seq_classification" else "CAUSAL_LM",
        **{k: v for k, v in merged.items() if k not in {"runtime_config", "inference_mode"}},
    }
    try:
        return cls(**merged)
    except (ValueError, TypeError, ImportError) as e:
        raise ConfigError(f"{source}: {_one_line(e)}") from e


def apply_peft(model: Any, train_config: TrainConfig, **kwargs: Any) -> Any:
    """Return ``model`` with the adapter to go on from, or else with a new adapter, its initial values drawn from ``train_config.seed``.

    Args:
        model: The base.
        train_config: As for :func:`generate_peft_config`; with ``use_peft`` false the same object is returned.
        **kwargs: Fields of the method's config.

    Raises:
        ConfigError: As :func:`generate_peft_config`, or the adapter does not fit the model.
    """
    if not train_config.use_peft:
        return model
    if train_config.quantization != "none":
        prepare: Any = prepare_model_for_kbit_training
        model = prepare(model, use_gradient_checkpointing=False)
        keep_trainable(model)
    if train_config.from_peft_checkpoint is not None:
        return _continued(model, train_config.from_peft_checkpoint)
    config = generate_peft_config(train_config, **kwargs)
    with torch.random.fork_rng():
        torch.manual_seed(train_config.seed)
        try:
            adapted = get_peft_model(model, config)
        except (ValueError, TypeError, AttributeError, ImportError) as e:
            raise ConfigError(
                f"{getattr(config.peft_type, 'value', config.peft_type)} does not fit {type(model).__name__}: {_one_line(e)}"
            ) from e
    folder = Path(str(config.base_model_name_or_path))
    if folder.is_dir():  # found again from any working directory
        config.base_model_name_or_path = str(folder.resolve())
    return adapted


def _continued(model: Any, folder: Path) -> Any:
    """Return ``model`` with the adapter in ``folder``, to be trained on."""
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    except (*_LOADING, TypeError, AttributeError) as e:
        raise ConfigError(
            f"from_peft_checkpoint {str(folder)!r} does not fit {type(model).__name__}: {_one_line(e)}"
        ) from e
    return adapted


def tasks_of(model: Any) -> int:
    """Return how many tasks the adapter of ``model`` holds one by one (Poly, multitask prompt tuning); 0 for most methods."""
    config = getattr(model, "peft_config", {}).get(getattr(model, "active_adapter", None))
    return next((n for field in ("num_tasks", "n_tasks") if (n := getattr(config, field, 0))), 0)


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Return how many parameters are trained, and how many there are."""
    if isinstance(model, PeftModel):
        trained, total = model.get_nb_trainable_parameters()
        return int(trained), int(total)
    total = sum(p.numel() for p in model.parameters())
    return sum(p.numel() for p in model.parameters() if p.requires_grad), total


def _checked_name(name: str, field: str) -> str:
    """Return ``name`` if it can be a folder of a model or a Hub id."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not any((path / f).is_file() for f in ("config.json", "tokenizer_config.json")):
            raise ConfigError(f"{field}: folder {name!r} holds no model: it has no config.json")
        return str(path)
    if path.exists():
        raise ConfigError(f"{field}: {name!r} is a file; name the folder that holds the model")
    if is_local(name):
        raise ConfigError(f"{field}: there is no folder {name!r}")
    return name


def _config_class(method: Any, source: str) -> type[PeftConfig]:
    methods = {peft_type.value.lower(): cls for peft_type, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    name = str(getattr(method, "value", method)).lower()
    if name not in methods:
        raise ConfigError(
            f"{source}: unknown peft_method {method!r}{suggest(name, methods)} (PEFT knows {', '.join(sorted(methods))})"
        )
    found: type[PeftConfig] = methods[name]
    return found


def _check_fields(cls: type[PeftConfig], values: dict[str, Any], source: str) -> None:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    try:
        hints = typing.get_type_hints(cls)
    except NameError:  # a hint that PEFT imports for type checkers only
        hints = {}
    for name, value in values.items():
        if name not in fields:
            raise ConfigError(f"{source}: {cls.__name__} has no field {name!r}{suggest(name, fields)}")
        hint = hints.get(name, Any)
        # PEFT leaves fields empty that it declares as numbers, and saves them so.
        if not (value is None and fields[name].default is None) and not _fits(value, hint):
            raise ConfigError(
                f"{source}: {name} of {cls.__name__} must be {_hint_name(hint)}, not {json.dumps(value, default=str)}"
            )


def _fits(value: Any, hint: Any) -> bool:
    """Tell whether ``value`` can be meant for a field of type ``hint``; types that say nothing fit everything."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in arguments)
    if origin is typing.Literal:
        # PEFT documents families of values as a literal like "pissa_niter_[number of iters]".
        return value in arguments or (isinstance(value, str) and any("[" in str(a) for a in arguments))
    if origin in (list, tuple, set):
        return isinstance(value, list | tuple | set) and all(_fits(v, arguments[0]) for v in value if arguments)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kind = origin or hint
    if kind in (str, bool, dict, type(None)):
        return isinstance(value, kind)
    return not isinstance(kind, type) or isinstance(value, kind | str | dict)


def _hint_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "").replace("NoneType", "None")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "…"
