# SPDX-License-Identifier: BSD-3-Clause
"""Data for sequence classification: rows of ``text`` and ``label`` become tokens and the label's number. Knows no models."""

import json
from collections.abc import Iterable
from typing import Any

from QEfficient.errors import ConfigError
from QEfficient.finetune.data import Example
from QEfficient.finetune.formats import Row

CLASSES_FILE = "classes.json"
"""Names of the classes, in the order of the head's outputs, beside the adapter."""


def class_names(rows: Iterable[tuple[str, Row]], source: str) -> list[str]:
    """Return the different labels of ``rows``: numbers in their order, or else words in the alphabet's.

    Raises:
        ConfigError: A row has no label, or all have the same.
    """
    labels = {_label(row, where) for where, row in rows}
    if len(labels) < 2:
        raise ConfigError(f"{source} holds {len(labels)} class(es): at least two are needed")
    numbers = all(isinstance(label, int) for label in labels)
    return [str(label) for label in sorted(labels, key=None if numbers else str)]


def to_class_examples(
    rows: Iterable[tuple[str, Row]], source: str, tokenizer: Any, *, context_length: int, classes: list[str]
) -> list[Example]:
    """Turn rows into examples whose ``labels`` hold one number: that of the class.

    Args:
        rows: Each with its place, which errors name.
        source: Where they come from.
        tokenizer: Of the base.
        context_length: Tokens of an example; the end of a longer one is cut.
        classes: Names of the classes.

    Raises:
        ConfigError: A row has no text, or a label that is not among ``classes``; or there is no row.
    """
    numbers = {name: i for i, name in enumerate(classes)}
    examples = []
    for where, row in rows:
        name = str(_label(row, where))
        if name not in numbers:
            raise ConfigError(f"{where}: label {name!r} is not among those of the training data: {', '.join(classes)}")
        text = row.get("text")
        if not isinstance(text, str) or not text:
            raise ConfigError(f"{where}: 'text' must be text, not {json.dumps(text, default=str)}")
        ids = tokenizer(text).input_ids
        cut = len(ids) > context_length
        if cut:
            ids = tokenizer(text, truncation=True, max_length=context_length).input_ids
        examples.append(Example(ids, [numbers[name]], cut))
    if not examples:
        raise ConfigError(f"{source} holds no examples")
    return examples


def rendered_class(example: Example, tokenizer: Any, classes: list[str]) -> str:
    """Return the text of ``example`` and, in ⟦ ⟧, its class."""
    return f"{tokenizer.decode(example.input_ids)} → ⟦{classes[example.labels[0]]}⟧"


def _label(row: Row, where: str) -> str | int:
    if "text" not in row or "label" not in row:
        fields = ", ".join(map(repr, row)) or "(none)"
        raise ConfigError(f"{where}: a row for seq_classification has the fields 'text' and 'label', not {fields}")
    label = row["label"]
    if not isinstance(label, str | int):
        raise ConfigError(f"{where}: 'label' must be a word or a whole number, not {json.dumps(label, default=str)}")
    return label
