# SPDX-License-Identifier: BSD-3-Clause
"""Answers in OpenAI's form, whole and in pieces."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from QEfficient.serve.completions import Piece, TokenText
from QEfficient.serve.server import Job


@dataclass(slots=True)
class Shape:
    """How the answers to one request look.

    Attributes:
        model: What the client asked for.
        chat: Conversation or text.
    """

    model: str
    chat: bool
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(init=False)

    def __post_init__(self) -> None:
        """Name the answer."""
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(12)}"

    def whole(self, job: Job, answers: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        """Return the body of complete answers."""
        kind = "chat.completion" if self.chat else "text_completion"
        choices = [self._choice(i, pieces) for i, pieces in enumerate(answers)]
        return {**self._head(kind), "choices": choices, "usage": usage(job)}

    def first(self, index: int) -> dict[str, Any]:
        """Return what a streamed conversation begins with."""
        return self._chunk({"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return one piece of a streamed answer."""
        choice: dict[str, Any] = {"index": index, "finish_reason": piece.finish_reason, "logprobs": None}
        if self.chat:
            choice["delta"] = {"content": piece.text} if piece.text else {}
        else:
            choice["text"] = piece.text
        if piece.tokens:
            choice["logprobs"] = self._logprobs(piece.tokens)
        return self._chunk(choice)

    def usage(self, job: Job) -> dict[str, Any]:
        """Return the piece behind the last, if usage was asked for."""
        return {**self._chunk({}), "choices": [], "usage": usage(job)}

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(p.text for p in pieces)
        tokens = [t for p in pieces for t in p.tokens]
        choice: dict[str, Any] = {"index": index, "finish_reason": pieces[-1].finish_reason}
        choice["logprobs"] = self._logprobs(tokens) if tokens else None
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        return choice

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk" if self.chat else "text_completion"), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, tokens: Sequence[TokenText]) -> dict[str, Any]:
        if self.chat:
            return {"content": [{**_told(t), "top_logprobs": [_told(o) for o in t.top]} for t in tokens]}
        return {
            "tokens": [t.text for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [{_label(o): o.logprob for o in t.top} for t in tokens],
            "text_offset": [t.start for t in tokens],
        }


def usage(job: Job) -> dict[str, int]:
    """Return how many tokens a request took."""
    new = job.new_tokens
    return {
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": new,
        "total_tokens": job.prompt_tokens + new,
    }


def _told(token: TokenText) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.raw)}


def _label(token: TokenText) -> str:
    """Return a name that no other token has: a part of a character is no text, and shows as its bytes."""
    whole = token.raw == token.text.encode("utf-8", "replace")
    return token.text if whole else "bytes:" + "".join(f"\\x{b:02x}" for b in token.raw)
