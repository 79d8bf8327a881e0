# SPDX-License-Identifier: BSD-3-Clause
"""From options to the examples that are trained on and those that are validated on. Knows no models."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from QEfficient.errors import ConfigError
from QEfficient.finetune.classes import class_names, to_class_examples
from QEfficient.finetune.config import TrainConfig
from QEfficient.finetune.data import Example, StreamedExamples, held_out, to_examples, unseen
from QEfficient.finetune.formats import Row, Segment, detect_format, read_segments
from QEfficient.finetune.sources import preprocessed, read_dataset, read_file
from QEfficient.finetune.streams import open_rows


@dataclass(slots=True)
class Sets:
    """Examples to train on and, perhaps, to validate on, and what is to be said about them."""

    train: Sequence[Example]
    val: list[Example]
    notes: list[str] = field(default_factory=list)


def load_classes(config: TrainConfig) -> list[str]:
    """Return the names of the classes in the training data; none unless classes are learned."""
    if config.task_mode != "seq_classification":
        return []
    return class_names(*_rows(config, config.train_file, config.dataset_split))


def load_sets(config: TrainConfig, tokenizer: Any, classes: Sequence[str] = ()) -> Sets:
    """Read the data of a training; nothing that is trained on is validated on.

    Args:
        config: Names the data.
        tokenizer: Of the base.
        classes: Names of the classes, if they are what is learned.

    Raises:
        ConfigError: The data cannot be read, or a row is broken.
    """
    options: dict[str, Any] = {"context_length": config.context_length}
    options |= {"classes": list(classes)} if classes else {"data_format": config.data_format}
    if config.streaming:
        return _streamed(config, tokenizer, options)
    train = _read(config, config.train_file, config.dataset_split, tokenizer, options)
    sets = Sets(train, [])
    if config.val_share:
        sets.train, sets.val = held_out(train, config.val_share, config.seed)
    elif config.validates:
        val = _read(config, config.val_file, config.val_dataset_split, tokenizer, options)
        sets.val = unseen(val, train)
        _say_left_out(sets, len(val))
    cut = sum(e.cut for e in sets.train)
    if cut:
        sets.notes.append(f"{cut:,} cut to {config.context_length} tokens")
    return sets


def _streamed(config: TrainConfig, tokenizer: Any, options: dict[str, Any]) -> Sets:
    """Leave the training data on disk; validation data, which are few, are watched for among them."""
    source = str(config.train_file or f"{config.dataset}[{config.dataset_split}]")
    rows = open_rows(config.train_file, config.dataset, config.dataset_split, config.dataset_config, config.preprocess)
    val: list[tuple[tuple[Segment, ...], tuple[str, Row]]] = []
    if config.validates:
        named = config.data_format
        for where, row in _rows(config, config.val_file, config.val_dataset_split)[0]:
            named = detect_format(row, where) if named == "auto" else named
            val.append((tuple(read_segments(row, where, tokenizer, named)), (where, row)))
    train = StreamedExamples(rows, source, tokenizer, **options, watched={segments for segments, _ in val})
    sets = Sets(train, [])
    if val:
        kept = [row for segments, row in val if segments not in train.met]
        sets.val = to_examples(kept, source, tokenizer, **options) if kept else []
        _say_left_out(sets, len(val))
    return sets


def _say_left_out(sets: Sets, given: int) -> None:
    """Note how many validation examples are training data.

    Raises:
        ConfigError: All of them are.
    """
    if not sets.val:
        raise ConfigError(f"all {given:,} validation examples are training data, too: name others")
    if len(sets.val) < given:
        sets.notes.append(f"{given - len(sets.val):,} validation examples are training data, too: left out")


def _read(
    config: TrainConfig, path: Path | None, split: str | None, tokenizer: Any, options: dict[str, Any]
) -> list[Example]:
    rows, source = _rows(config, path, split)
    read = to_class_examples if "classes" in options else to_examples
    return read(rows, source, tokenizer, **options)


def _rows(config: TrainConfig, path: Path | None, split: str | None) -> tuple[Iterator[tuple[str, Row]], str]:
    """Return the rows of a file or a split, preprocessed, and what they come from."""
    source = str(path) if path else f"{config.dataset}[{split}]"
    named = config.task_mode == "seq_classification"
    rows: Iterator[tuple[str, Row]] = (
        read_file(path) if path else read_dataset(str(config.dataset), str(split), config.dataset_config, named=named)
    )
    return (preprocessed(rows, config.preprocess) if config.preprocess else rows), source
