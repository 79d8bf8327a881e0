# SPDX-License-Identifier: BSD-3-Clause
"""One answer: a request to the engine, its tokens as text, where it ends.

Knows the engine and text; does not know HTTP or OpenAI's bodies.
"""

import asyncio
import math
import time
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
        top: The likeliest tokens at its place.
    """

    text: str
    raw: bytes
    logprob: float
    top: "tuple[TokenText, ...]" = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """Some more of an answer.

    Attributes:
        text: What is certain now.
        tokens: Those that came since the last piece, if log probabilities were asked for.
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
                    yield Piece(self._rest(), finish_reason=self._reason())
                    return
                self.new_tokens += 1
                self.timing.tick()
                ends = token.id in self._eos
                text = "" if ends else self._stops.add(self._detokenizer.add(token.id))
                told = (self._told(token),) if self._with_logprobs and not ends else ()
                if self._stops.found:
                    yield Piece(text, told, "stop")
                    return
                if text or told:
                    yield Piece(text, told)
        finally:
            self._stream.cancel()

    def _rest(self) -> str:
        return self._stops.add(self._detokenizer.flush()) + self._stops.flush()

    def _reason(self) -> str:
        reason = self._stream.finish_reason
        if reason == "error":
            raise EngineFailedError("the engine failed") from self._stream.error
        if self._stops.found:
            return "stop"
        return "abort" if reason == "cancelled" else str(reason)

    def _told(self, token: Token) -> TokenText:
        logprob = token.logprob if token.logprob is not None else 0.0
        return self._named(token.id, logprob, tuple(self._named(i, p) for i, p in token.top_logprobs))

    def _named(self, token: int, logprob: float, top: tuple[TokenText, ...] = ()) -> TokenText:
        text = str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))
        return TokenText(text, token_bytes(self._tokenizer, token, text), _finite(logprob), top)


def _finite(logprob: float) -> float:
    """Return what JSON can hold: OpenAI's -9999.0 for what is impossible."""
    return float(logprob) if math.isfinite(logprob) else -9999.0
