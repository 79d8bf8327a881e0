# SPDX-License-Identifier: BSD-3-Clause
"""What an engine is asked for, and what comes back: requests, tokens and streams of them."""

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from QEfficient.contract import BASE
from QEfficient.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: Keep the likeliest tokens that together have this probability.
        top_k: Keep this many of the likeliest tokens; 0: all.
        seed: The same seed gives the same tokens, whatever else runs; ``None``: another one each time.
        presence_penalty: Taken off the logit of every token that the request has produced.
        frequency_penalty: Taken off it once for each time.
        logit_bias: Added to the logits of these tokens.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse values out of range, NaN included."""
        biases = self.logit_bias.values()
        numbers = (self.temperature, self.presence_penalty, self.frequency_penalty, *biases)
        if not all(math.isfinite(n) for n in numbers):
            raise ConfigError("temperature, penalties and logit_bias must be finite")
        if self.temperature < 0:
            raise ConfigError(f"temperature must be at least 0, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise ConfigError(f"top_k must be at least 0, not {self.top_k}")
        if self.seed is not None and self.seed < 0:
            raise ConfigError(f"seed must be at least 0, not {self.seed}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt to continue.

    Attributes:
        prompt_ids: Token ids, at least one.
        adapter: Name of a resident adapter, or ``"base"``.
        max_new_tokens: Most tokens to produce.
        eos_ids: Tokens that end the request; the token itself is delivered too.
        sampling: How tokens are chosen.
        logprobs: Deliver log probabilities, with this many alternatives; ``None``: none.
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int
    adapter: str = BASE
    eos_ids: frozenset[int] = frozenset()
    sampling: Sampling = field(default_factory=Sampling)
    logprobs: int | None = None


def check(request: Request, vocab_size: int, ctx_len: int, virtual_tokens: int) -> None:
    """Refuse a request that a program cannot serve.

    Args:
        request: The request.
        vocab_size: Of the program.
        ctx_len: Positions of a slot.
        virtual_tokens: Entries that the adapter puts first into it.

    Raises:
        ConfigError: Token ids or sizes that do not fit.
    """
    prompt, new = len(request.prompt_ids), request.max_new_tokens
    if prompt < 1:
        raise ConfigError("the prompt is empty: it needs at least one token")
    if new < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, not {new}")
    if (need := virtual_tokens + prompt + new) > ctx_len:
        more = f"{virtual_tokens} virtual tokens of the adapter, " if virtual_tokens else ""
        raise ConfigError(
            f"the context does not fit: {more}{prompt} prompt tokens and {new} new ones are {need}, a slot holds {ctx_len}"
        )
    for name, ids in (("prompt_ids", request.prompt_ids), ("logit_bias", request.sampling.logit_bias)):
        if (unknown := first_unknown(ids, vocab_size)) is not None:
            raise ConfigError(f"{name}: token ids must be in [0, {vocab_size}), not {unknown}")
    if request.logprobs is not None and request.logprobs < 0:
        raise ConfigError(f"logprobs must be at least 0, not {request.logprobs}")


def first_unknown(ids: Iterable[int], vocab_size: int) -> int | None:
    """Return the first token that a base of so many tokens lacks; None if it has all."""
    return next((i for i in ids if not 0 <= i < vocab_size), None)


@dataclass(frozen=True, slots=True)
class Token:
    """One token, with its log probability and those of the likeliest ones, likeliest first, if asked for."""

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Stream:
    """The tokens of one request, as they come. Iterating waits for them; any thread may."""

    def __init__(self, request: Request, cancel: Callable[["Stream"], None]) -> None:
        self.request = request
        self.error: BaseException | None = None
        self._cancel = cancel
        self._condition = threading.Condition()
        self._tokens: list[Token] = []
        self._reason: str | None = None
        self._callback: Callable[[Token | None], None] | None = None
        self._taken = 0

    @property
    def finish_reason(self) -> str | None:
        """``"stop"``, ``"length"``, ``"cancelled"`` or ``"error"`` (see ``error``); ``None`` while it goes on."""
        return self._reason

    @property
    def tokens(self) -> tuple[Token, ...]:
        """What has come so far."""
        with self._condition:
            return tuple(self._tokens)

    @property
    def on_token(self) -> Callable[[Token | None], None] | None:
        """Called with each token, and with ``None`` at the end, in the engine's thread; it must return quickly.

        If it raises, its request ends with that error. Setting it also delivers what has come before, in the setter's thread.
        """
        return self._callback

    @on_token.setter
    def on_token(self, callback: Callable[[Token | None], None] | None) -> None:
        with self._condition:
            self._callback = callback
            if callback is not None:
                for token in self._tokens:
                    callback(token)
                if self._reason is not None:
                    callback(None)

    def cancel(self) -> None:
        """End the request now; its slot is free before the engine's next step."""
        self._cancel(self)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end; return whether it came."""
        with self._condition:
            return self._condition.wait_for(lambda: self._reason is not None, timeout)

    def __iter__(self) -> Iterator[Token]:
        """Return the stream itself."""
        return self

    def __next__(self) -> Token:
        """Return the next token; several threads that iterate share the tokens."""
        with self._condition:
            self._condition.wait_for(lambda: self._taken < len(self._tokens) or self._reason is not None)
            if self._taken == len(self._tokens):
                raise StopIteration
            self._taken += 1
            return self._tokens[self._taken - 1]

    def _put(self, token: Token) -> None:
        with self._condition:
            if self._reason is not None:
                return
            self._tokens.append(token)
            self._condition.notify_all()
            if self._callback is not None:
                self._callback(token)

    def _end(self, reason: str, error: BaseException | None = None) -> None:
        with self._condition:
            if self._reason is not None:
                return
            self._reason, self.error = reason, error
            self._condition.notify_all()
            if self._callback is not None:
                with suppress(Exception):  # the request has ended: there is nobody left to tell
                    self._callback(None)
