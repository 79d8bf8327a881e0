# SPDX-License-Identifier: BSD-3-Clause
"""Training data: rows become tokens and labels. Knows no models and no options.

A row is first turned into segments, each either given (a prompt, masked with :data:`IGNORED`) or learned; then into tokens.
Segments are tokenized apart, because a prompt is tokenized alone, too, when the model is used.
"""

import dataclasses
import json
import random
from array import array
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from QEfficient.errors import ConfigError
from QEfficient.finetune.formats import Row, Segment, detect_format, read_segments, read_task
from QEfficient.finetune.sources import read_file
from QEfficient.finetune.streams import RowsOnDisk

IGNORED = -100
"""Label of a token that takes no part in the loss."""


@dataclass(frozen=True, slots=True)
class Example:
    """Tokens and labels of one row, of equal length; ``cut`` if the row was longer; ``task`` for methods that have several."""

    input_ids: list[int]
    labels: list[int]
    cut: bool = False
    task: int = 0


def load_examples(path: Path, tokenizer: Any, *, context_length: int, data_format: str = "auto") -> list[Example]:
    """Read a file of rows into examples; see :func:`to_examples`."""
    return to_examples(read_file(path), str(path), tokenizer, context_length=context_length, data_format=data_format)


def to_examples(
    rows: Iterable[tuple[str, Row]], source: str, tokenizer: Any, *, context_length: int, data_format: str = "auto"
) -> list[Example]:
    """Turn rows into examples.

    Args:
        rows: Each with its place, which errors name.
        source: Where they come from.
        tokenizer: Of the base; with an end-of-sequence token.
        context_length: Tokens of an example; see :func:`tokenize`.
        data_format: A name of ``FORMATS``, or ``"auto"`` to detect it from the first row.

    Raises:
        ConfigError: A row is broken or of another format, or there is none.
    """
    examples = []
    for where, row in rows:
        if data_format == "auto":
            data_format = detect_format(row, where)
        examples.append(to_example(row, where, tokenizer, context_length, data_format))
    if not examples:
        raise ConfigError(f"{source} holds no examples")
    return examples


def to_example(row: Row, where: str, tokenizer: Any, context_length: int, data_format: str) -> Example:
    """Turn one row of the named format into an example.

    Raises:
        ConfigError: It is broken.
    """
    segments, task = read_segments(row, where, tokenizer, data_format), read_task(row, where)
    example = tokenize(segments, tokenizer, context_length, chat=data_format == "messages")
    return dataclasses.replace(example, task=task) if task else example


class StreamedExamples(Sequence[Example]):
    """Examples whose rows stay on disk and are read when they are asked for; all were looked at once.

    Attributes:
        digest: Of all rows, in order.
        met: Which of ``watched`` are among them: what they are given and learn, as segments.
    """

    def __init__(
        self,
        rows: RowsOnDisk,
        source: str,
        tokenizer: Any,
        *,
        context_length: int,
        data_format: str = "auto",
        watched: Collection[tuple[Segment, ...]] = (),
    ) -> None:
        self._rows, self._source, self._tokenizer, self._context_length = rows, source, tokenizer, context_length
        self._format, self._count = data_format, 0
        hasher = xxhash.xxh3_128()
        self.met: set[tuple[Segment, ...]] = set()
        for where, row in rows.scan():
            if self._format == "auto":
                self._format = detect_format(row, where)
            segments = tuple(read_segments(row, where, tokenizer, self._format))
            if segments in watched:
                self.met.add(segments)
            read_task(row, where)
            hasher.update(json.dumps(row, default=str).encode() + b"\n")
            self._count += 1
        if not self._count:
            raise ConfigError(f"{source} holds no examples")
        self.digest = hasher.hexdigest()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not -self._count <= index < self._count:
            raise IndexError(f"there is no example {index}, there are {self._count}")
        index %= self._count
        row, where = self._rows.read(index), f"{self._source}, row {index + 1}"
        return to_example(row, where, self._tokenizer, self._context_length, self._format)


def held_out(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split off ``share`` of the examples; those with the same tokens stay together, so nothing is on both sides.

    Raises:
        ConfigError: One side would be empty.
    """
    keys = list(dict.fromkeys(tuple(e.input_ids) for e in examples))
    random.Random(seed).shuffle(keys)
    chosen = set(keys[: max(1, round(share * len(keys)))])
    kept = [e for e in examples if tuple(e.input_ids) not in chosen]
    if not kept:
        raise ConfigError(f"val_share {share} of {len(keys)} different examples leaves none to train on")
    return kept, [e for e in examples if tuple(e.input_ids) in chosen]


def unseen(examples: list[Example], trained: Sequence[Example]) -> list[Example]:
    """Return the examples that are not trained on."""
    known = {tuple(e.input_ids) for e in trained}
    return [e for e in examples if tuple(e.input_ids) not in known]


def rendered(example: Example, tokenizer: Any, *, width: int = 600) -> str:
    """Return the text of ``example``, with ⟦ ⟧ around what is learned; long parts are shortened in their middle."""
    parts: list[tuple[bool, list[int]]] = []
    for token, label in zip(example.input_ids, example.labels, strict=True):
        learned = label != IGNORED
        if not parts or parts[-1][0] != learned:
            parts.append((learned, []))
        parts[-1][1].append(token)
    texts = []
    for learned, tokens in parts:
        text = tokenizer.decode(tokens)
        text = text if len(text) <= width else f"{text[: width // 2]} … {text[-width // 2 :]}"
        texts.append(f"⟦{text}⟧" if learned else text)
    return "".join(texts)


def tokenize(segments: list[Segment], tokenizer: Any, context_length: int, *, chat: bool = False) -> Example:
    """Return the tokens of ``segments``, with labels for what is learned.

    Special tokens in front come from the tokenizer, except in a chat, whose template writes them. EOS ends the example,
    unless the template has ended it already. Too long an example first loses the beginning of its prompt, until that is a quarter
    of ``context_length``, then its own end: what is learned stays as far as it can.
    """
    eos = tokenizer.eos_token_id
    start = [] if chat else _special_prefix(tokenizer)
    ids, labels = list(start), [IGNORED] * len(start)
    for segment in segments:
        tokens = tokenizer(segment.text, add_special_tokens=False).input_ids
        learned = _until_last(tokens, eos) if segment.learned else 0
        ids += tokens
        labels += tokens[:learned] + [IGNORED] * (len(tokens) - learned)
    if eos not in (ids[-2:] if chat else ids[-1:]):  # a template may write a line break behind it
        ids.append(eos)
        labels.append(eos)
    return _cut(ids, labels, context_length, len(start))


def _until_last(tokens: list[int], eos: int) -> int:
    """Return how many tokens there are up to the last ``eos``: behind it generation has stopped, so nothing is learned."""
    return len(tokens) - tokens[::-1].index(eos) if eos in tokens else len(tokens)


def _cut(ids: list[int], labels: list[int], context_length: int, keep: int) -> Example:
    """Shorten to ``context_length``; the first ``keep`` tokens stay."""
    surplus = len(ids) - context_length
    if surplus <= 0:
        return Example(ids, labels)
    prompt = next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))
    stays = max(context_length // 4, keep)
    drop = min(surplus, max(0, prompt - stays))
    ids = ids[:keep] + ids[keep + drop :]
    labels = labels[:keep] + labels[keep + drop :]
    return Example(ids[:context_length], labels[:context_length], cut=True)


def _special_prefix(tokenizer: Any) -> list[int]:
    """Return the special tokens that the tokenizer puts in front of a text."""
    ids = tokenizer("").input_ids
    return [token for token in ids if token != tokenizer.eos_token_id or token == tokenizer.bos_token_id][:1]


def digest(examples: Sequence[Example]) -> str:
    """Return what tells these examples, in this order, from others."""
    known = getattr(examples, "digest", None)
    if isinstance(known, str):
        return known
    hasher = xxhash.xxh3_128()
    for example in examples:
        for values in (example.input_ids, example.labels, *([[example.task]] if example.task else [])):
            hasher.update(array("q", [len(values), *values]).tobytes())
    return hasher.hexdigest()
