# SPDX-License-Identifier: BSD-3-Clause
"""Text at the borders of the engine: prompts become tokens, tokens become text as they come.

Knows tokenizers; does not know HTTP or the engine.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from QEfficient.errors import ConfigError

_UNFINISHED = "\ufffd"
_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
"""Bytes by the characters that byte-level tokenizers write for them."""


def token_bytes(tokenizer: Any, token: int, text: str) -> bytes:
    """Return what a token stands for, which may be a part of a character; ``text`` is what it is decoded to alone."""
    if _UNFINISHED not in text:
        return text.encode("utf-8", "replace")
    piece = str(tokenizer.convert_ids_to_tokens(token))
    if found := re.fullmatch("<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(found[1])
    return bytes(_BYTES[c] for c in piece) if all(c in _BYTES for c in piece) else text.encode()


class Detokenizer:
    """Turns the tokens of one answer into text, piece by piece; the pieces joined are the text of all tokens.

    A character may be spread over several tokens, and the space before a word shows only together with the token before it.
    So a piece is what a short window of tokens says more than it said without the newest, and it waits while it ends within a
    character.

    Attributes:
        waiting: Characters of what waits; the last one is unfinished.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.waiting = 0
        self._ids: list[int] = []
        self._window = self._read = 0

    def add(self, token: int) -> str:
        """Return the text that is certain now and was not before; often of this token, sometimes none."""
        self._ids.append(token)
        before = self._decode(self._ids[self._window : self._read])
        now = self._decode(self._ids[self._window :])
        if now.endswith(_UNFINISHED) or len(now) <= len(before):
            self.waiting = max(0, len(now) - len(before))
            return ""
        self.waiting = 0
        self._window, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def flush(self) -> str:
        """Return what still waits at the end of the answer, an unfinished character as U+FFFD."""
        before = self._decode(self._ids[self._window : self._read])
        now = self._decode(self._ids[self._window :])
        self._window = self._read = len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class StopStrings:
    """Ends a text before the first stop string, wherever the borders of the pieces are."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [s for s in stops if s]
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """Return what may be shown; the start of what may become a stop string is held back."""
        if self.found:
            return ""
        self._held += text
        starts = [i for s in self._stops if (i := self._held.find(s)) >= 0]
        if starts:
            self.found = True
            shown, self._held = self._held[: min(starts)], ""
            return shown
        keep = max((_overlap(self._held, s) for s in self._stops), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """Return what was held back, at the end of the text."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that ``stop`` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Prompts:
    """Makes prompts' tokens with one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def of_text(self, text: str) -> list[int]:
        """Return the tokens of a text, with what the tokenizer puts in front of one."""
        return [int(i) for i in self.tokenizer(text)["input_ids"]]

    def of_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the tokens of a conversation, ready for the answer.

        Raises:
            ConfigError: The tokenizer has no chat template, or the template refuses these messages.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError("this base's tokenizer has no chat template: use /v1/completions")
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(m) for m in messages], add_generation_prompt=True, tokenize=False
            )
        except Exception as e:  # a template raises what it likes
            raise ConfigError(f"the chat template refuses these messages: {str(e).strip() or type(e).__name__}") from e
        return [int(i) for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]]
