# SPDX-License-Identifier: BSD-3-Clause
"""One answer: a request to the engine, its tokens as text, where it ends.

Knows the engine and text; does not know HTTP or OpenAI's bodies.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from QEfficient.runtime.requests import Request, Stream, Token
from QEfficient.serve.text import Detokenizer, StopStrings, token_bytes


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token as a client sees it.

    Attributes:
        text: Of the token alone.
        raw: Its bytes; those of a part of a character are no text.
        logprob: Of the token.
        start: Where its text begins in the answer; behind an unfinished character, where that does: it may be a part of it.
        top: The likeliest tokens at its place.
    """

    text: str
    raw: bytes
    logprob: float
    start: int = 0
    top: "tuple[TokenText, ...]" = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """Some more of an answer.

    Attributes:
        text: What is certain now.
        tokens: Those whose text begins in it, if log probabilities were asked for; what a stop string cuts off has none.
        finish_reason: At the end, why.
    """

    text: str
    tokens: tuple[TokenText, ...] = ()
    finish_reason: str | None = None


@dataclass(slots=True)
class Timing:
    """When tokens came, in seconds after the start.

    Attributes:
        start: On the clock of ``time.perf_counter``.
        first: The first token, ``None`` before.
        last: The newest one.
        gaps: From token to token.
    """

    start: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)

    def tick(self) -> None:
        """Note a token."""
        now = time.perf_counter() - self.start
        if self.first is None:
            self.first = now
        else:
            self.gaps.append(now - self.last)
        self.last = now


class EngineFailedError(RuntimeError):
    """The engine gave up on a request."""


class Answer:
    """One answer on its way. Iterate over it once, then it is complete; :meth:`close` ends it early.

    Args:
        engine: Where it is made.
        request: What is asked for.
        tokenizer: Its language.
        stops: Strings that end it.
    """

    def __init__(self, engine: Any, request: Request, tokenizer: Any, stops: list[str]) -> None:
        self.new_tokens = 0
        self.timing = Timing()
        self._tokenizer = tokenizer
        self._detokenizer, self._stops = Detokenizer(tokenizer), StopStrings(stops)
        self._eos, self._with_logprobs = request.eos_ids, request.logprobs is not None
        self._queue: asyncio.Queue[Token | None] = asyncio.Queue()
        self._held: deque[TokenText] = deque()  # their text is not shown yet
        self._read = self._shown = 0  # characters
        loop = asyncio.get_running_loop()
        self._stream: Stream = engine.submit(request)

        def put(token: Token | None) -> None:
            try:
                loop.call_soon_threadsafe(self._queue.put_nowait, token)
            except RuntimeError:  # the loop is closed: nobody waits any more
                pass

        self._stream.on_token = put

    def close(self) -> None:
        """Give its slot back; does nothing at the end."""
        self._stream.cancel()

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield the answer as it comes; the last piece has the finish reason.

        Raises:
            EngineFailedError: The engine gave up.
        """
        try:
            while True:
                token = await self._queue.get()
                if token is None:
                    text = self._show(self._detokenizer.flush())
                    text += self._stops.flush()
                    yield Piece(text, self._told(everything=not self._stops.found), self._reason())
                    return
                self.new_tokens += 1
                self.timing.tick()
                ends = token.id in self._eos
                if ends:
                    continue
                if self._with_logprobs:
                    self._held.append(self._named_with_top(token))
                text = self._show(self._detokenizer.add(token.id))
                if self._stops.found:
                    yield Piece(text, self._told(), "stop")
                    return
                if text:
                    yield Piece(text, self._told())
        finally:
            self._stream.cancel()

    def _show(self, added: str) -> str:
        """Return what may be shown now that this text was added."""
        self._read += len(added)
        text = self._stops.add(added)
        self._shown += len(text)
        return text

    def _told(self, *, everything: bool = False) -> tuple[TokenText, ...]:
        """Return the tokens that were not told yet and whose text is shown, at least its beginning."""
        told = []
        while self._held and (everything or self._held[0].start < self._shown):
            told.append(self._held.popleft())
        return tuple(told)

    def _reason(self) -> str:
        reason = self._stream.finish_reason
        if reason == "error":
            raise EngineFailedError("the engine failed") from self._stream.error
        if self._stops.found:
            return "stop"
        return "abort" if reason == "cancelled" else str(reason)

    def _named_with_top(self, token: Token) -> TokenText:
        logprob = token.logprob if token.logprob is not None else 0.0
        return self._named(token.id, logprob, tuple(self._named(i, p) for i, p in token.top_logprobs))

    def _start(self) -> int:
        return self._read + max(0, self._detokenizer.waiting - 1)

    def _named(self, token: int, logprob: float, top: tuple[TokenText, ...] = ()) -> TokenText:
        text = str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))
        return TokenText(text, token_bytes(self._tokenizer, token, text), _finite(logprob), self._start(), top)


def _finite(logprob: float) -> float:
    """Return what JSON can hold: OpenAI's -9999.0 for what is impossible."""
    return float(logprob) if math.isfinite(logprob) else -9999.0
