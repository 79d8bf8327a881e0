# SPDX-License-Identifier: BSD-3-Clause
"""Training data: lines of JSON become tokens and labels. Knows no models and no options.

A row is first turned into segments, each either given (a prompt, masked with :data:`IGNORED`) or learned; then into tokens.
Segments are tokenized apart, because a prompt is tokenized alone, too, when the model is used.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from QEfficient.errors import ConfigError

IGNORED = -100
"""Label of a token that takes no part in the loss."""

Row: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of an example's text; ``learned`` parts are what the model shall write."""

    text: str
    learned: bool


@dataclass(frozen=True, slots=True)
class Example:
    """Tokens and labels of one row, of equal length; ``cut`` if the row was longer."""

    input_ids: list[int]
    labels: list[int]
    cut: bool = False


def text_segments(row: Row, tokenizer: Any) -> list[Segment]:
    """Learn all of ``text``."""
    return [Segment(_string(row, "text"), True)]


def completion_segments(row: Row, tokenizer: Any) -> list[Segment]:
    """Learn ``completion`` after ``prompt``."""
    return [Segment(_string(row, "prompt", may_be_empty=True), False), Segment(_string(row, "completion"), True)]


def instruction_segments(row: Row, tokenizer: Any) -> list[Segment]:
    """Learn ``output`` after ``instruction`` and, if it is there, ``input``, in Alpaca's words."""
    instruction, output = _string(row, "instruction"), _string(row, "output")
    given = _string(row, "input", may_be_empty=True) if row.get("input") is not None else ""
    context = ", paired with an input that provides further context" if given else ""
    request = f"### Instruction:\n{instruction}\n\n" + (f"### Input:\n{given}\n\n" if given else "")
    prompt = (
        f"Below is an instruction that describes a task{context}. "
        f"Write a response that appropriately completes the request.\n\n{request}### Response:\n"
    )
    return [Segment(prompt, False), Segment(output, True)]


def message_segments(row: Row, tokenizer: Any) -> list[Segment]:
    """Learn what the assistant says in ``messages``, as the tokenizer's chat template writes it."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError("'messages' must be a list of role and content")
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"each of 'messages' needs role and content, not {json.dumps(message)}")
    if not any(m["role"] == "assistant" for m in messages):
        raise ValueError("no message has the role 'assistant', so there is nothing to learn")
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; use another data format or the base's chat version")

    def written(count: int, reply: bool) -> str:
        text: str = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=reply)
        return text

    segments, done = [], ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = written(i, True), written(i + 1, False)
        if not (before.startswith(done) and after.startswith(before)):
            raise ValueError("the tokenizer's chat template rewrites earlier messages, so replies cannot be told apart")
        segments += [Segment(before[len(done) :], False), Segment(after[len(before) :], True)]
        done = after
    return segments


FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Row, Any], list[Segment]]]] = {
    "messages": (("messages",), message_segments),
    "instruction": (("instruction", "output"), instruction_segments),
    "completion": (("prompt", "completion"), completion_segments),
    "text": (("text",), text_segments),
}
"""Name of a format → the fields by which it is detected, and what reads a row of it."""


def load_examples(path: Path, tokenizer: Any, *, context_length: int, data_format: str = "auto") -> list[Example]:
    """Read a JSONL file into examples.

    Args:
        path: One JSON object a line; empty lines are skipped.
        tokenizer: Of the base; with an end-of-sequence token.
        context_length: Tokens of an example; see :func:`tokenize`.
        data_format: A name of :data:`FORMATS`, or ``"auto"`` to detect it from the first row.

    Raises:
        ConfigError: A row is broken or of another format; named by file and line.
    """
    examples = []
    for number, row in read_jsonl(path):
        if data_format == "auto":
            data_format = detect_format(row, f"{path}:{number}")
        try:
            segments = FORMATS[data_format][1](row, tokenizer)
        except ValueError as e:
            raise ConfigError(f"{path}:{number}: {e} (format {data_format!r})") from e
        examples.append(tokenize(segments, tokenizer, context_length, chat=data_format == "messages"))
    if not examples:
        raise ConfigError(f"{path} holds no examples")
    return examples


def read_jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield line number and row of each line that is not empty.

    Raises:
        ConfigError: A line is not UTF-8 or not a JSON object.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                row = json.loads(text) if text else None
            except ValueError as e:  # also UnicodeDecodeError
                raise ConfigError(f"{path}:{number}: not a line of JSON: {e}") from e
            if not text:
                continue
            if not isinstance(row, dict):
                raise ConfigError(f'{path}:{number}: must be an object like {{"text": …}}, not {type(row).__name__}')
            yield number, row


def detect_format(row: Row, where: str) -> str:
    """Return the format whose fields ``row`` has.

    Raises:
        ConfigError: It has the fields of none.
    """
    for name, (fields, _) in FORMATS.items():
        if all(field in row for field in fields):
            return name
    known = "; ".join(f"{name}: {', '.join(fields)}" for name, (fields, _) in FORMATS.items())
    raise ConfigError(f"{where}: fields {', '.join(map(repr, row)) or '(none)'} are of no known format ({known})")


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


def _string(row: Row, field: str, *, may_be_empty: bool = False) -> str:
    if field not in row:
        raise ValueError(f"field {field!r} is missing")
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(f"{field!r} must be text, not {json.dumps(value)}")
    if not value and not may_be_empty:
        raise ValueError(f"{field!r} is empty")
    return value


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads examples on the right to the longest; padding is masked by position, whatever token it is.

    Attributes:
        pad_token_id: What fills ``input_ids``.
    """

    pad_token_id: int

    def __call__(self, examples: list[Any]) -> dict[str, torch.Tensor]:
        """Return ``input_ids``, ``attention_mask`` and ``labels``, each ``(B, S)`` int64."""
        length = max(len(e.input_ids) for e in examples)
        rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for e in examples:
            rest = length - len(e.input_ids)
            rows["input_ids"].append(e.input_ids + [self.pad_token_id] * rest)
            rows["attention_mask"].append([1] * len(e.input_ids) + [0] * rest)
            rows["labels"].append(e.labels + [IGNORED] * rest)
        return {name: torch.tensor(values) for name, values in rows.items()}
