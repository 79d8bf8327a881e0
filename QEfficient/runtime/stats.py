# SPDX-License-Identifier: BSD-3-Clause
"""What an engine counts."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(slots=True)
class Stats:
    """What an engine has done, and what it is doing.

    Attributes:
        slots: Rows of the cache.
        active: Rows in use.
        waiting: Requests that wait.
        prompt_tokens: Prompt tokens computed.
        new_tokens: Tokens produced.
        prefill_seconds: Time in calls that took prompts.
        decode_seconds: Time in calls that produced tokens.
        full_tokens: Tokens of those calls in which every slot decoded.
        full_seconds: Time in them.
        prefix_bytes: What kept prefixes take.
        requests: Requests accepted, by adapter.
        tokens: Tokens produced, by adapter.
        reused: Prompt tokens not computed because a prefix of them was kept, by adapter.
        finished: Requests ended, by finish reason.
    """

    slots: int
    active: int = 0
    waiting: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    full_tokens: int = 0
    full_seconds: float = 0.0
    prefix_bytes: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    reused: Counter[str] = field(default_factory=Counter)
    finished: Counter[str] = field(default_factory=Counter)

    def copy(self, **now: Any) -> "Stats":
        """Return a copy that does not change any more, with some fields as they are now."""
        counters = {n: c.copy() for n in self.__slots__ if isinstance(c := getattr(self, n), Counter)}
        return replace(self, **{**counters, **now})
