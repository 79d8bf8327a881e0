# SPDX-License-Identifier: BSD-3-Clause
"""The field's formats of a row: which fields it has, what of it is given and what is learned. Knows no tokens."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from QEfficient.errors import ConfigError

Row: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of an example's text; ``learned`` parts are what the model shall write."""

    text: str
    learned: bool


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


def read_segments(row: Row, where: str, tokenizer: Any, data_format: str) -> list[Segment]:
    """Return the segments of a row of the named format.

    Raises:
        ConfigError: The row is broken or of another format.
    """
    try:
        return FORMATS[data_format][1](row, tokenizer)
    except ValueError as e:
        raise ConfigError(f"{where}: {e} (format {data_format!r})") from e


def read_task(row: Row, where: str) -> int:
    """Return which task a row belongs to, ``task_id``: the first one if it does not say.

    Raises:
        ConfigError: It is not a whole number.
    """
    task = row.get("task_id")
    if task is None:
        return 0
    if not isinstance(task, int) or isinstance(task, bool) or task < 0:
        raise ConfigError(f"{where}: 'task_id' must be 0, 1, 2, …, not {json.dumps(task, default=str)}")
    return task


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


def _string(row: Row, field: str, *, may_be_empty: bool = False) -> str:
    if field not in row:
        raise ValueError(f"field {field!r} is missing")
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(f"{field!r} must be text, not {json.dumps(value, default=repr)}")
    if not value and not may_be_empty:
        raise ValueError(f"{field!r} is empty")
    return value
