# SPDX-License-Identifier: BSD-3-Clause
"""The next token from logits, for one row at a time: nothing here depends on other rows."""

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt

from QEfficient.runtime.requests import Request, Sampling, Token

Array = npt.NDArray[Any]

_FIRST_SORTED = 256
"""Tokens that ``top_p`` looks at first; it rarely needs more."""

_COLDEST = 1e-30
"""A temperature below this is this one: float32 knows none that is much smaller, and both take the likeliest token."""


class Chooser:
    """Chooses the tokens of one request: its random numbers, and what it has produced."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._random = np.random.default_rng(request.sampling.seed)
        self._produced: Counter[int] = Counter()

    def choose(self, logits: Array) -> Token:
        """Return the next token for logits ``(V,)``; log probabilities are those of the model, before penalties."""
        sampling = self._request.sampling
        scores = self._penalised(logits, sampling)
        if sampling.temperature == 0:
            chosen = int(scores.argmax())
        else:
            chosen = self._draw(scores, sampling)
        self._produced[chosen] += 1
        if self._request.logprobs is None:
            return Token(chosen)
        return _with_logprobs(logits, chosen, self._request.logprobs)

    def _penalised(self, logits: Array, sampling: Sampling) -> Array:
        penalty = sampling.presence_penalty or sampling.frequency_penalty
        if not (sampling.logit_bias or (penalty and self._produced)):
            return logits
        scores = logits.copy()
        for token, bias in sampling.logit_bias.items():
            scores[token] += bias
        for token, count in self._produced.items() if penalty else ():
            scores[token] -= sampling.presence_penalty + count * sampling.frequency_penalty
        return scores

    def _draw(self, scores: Array, sampling: Sampling) -> int:
        kept = None  # all of them
        if 0 < sampling.top_k < len(scores):
            kept = np.sort(_largest(scores, sampling.top_k))
            scores = scores[kept]
        weights = np.exp((scores - scores.max()) / np.float32(max(sampling.temperature, _COLDEST)))
        if sampling.top_p < 1:
            nucleus = _nucleus(weights, sampling.top_p)
            weights, kept = weights[nucleus], nucleus if kept is None else kept[nucleus]
        # In the order of the ids, so that nothing needs sorting: a vocabulary of 150,000 takes 20 ms.
        sums = np.cumsum(weights, dtype=np.float64)
        at = min(int(np.searchsorted(sums, self._random.random() * sums[-1], side="right")), len(sums) - 1)
        return at if kept is None else int(kept[at])


def _nucleus(weights: Array, top_p: float) -> Array:
    """Return the ids, ascending, of the fewest weights that have this share of all; only as many are sorted as that takes."""
    enough, most = top_p * weights.sum(dtype=np.float64), _FIRST_SORTED
    while True:
        best = _largest(weights, most)
        sums = np.cumsum(weights[best], dtype=np.float64)
        if sums[-1] >= enough or most >= len(weights):
            return np.sort(best[: int(np.searchsorted(sums, enough)) + 1])
        most *= 8


def _largest(values: Array, count: int) -> Array:
    """Return the places of the largest values, largest first."""
    best: Array = np.arange(len(values))
    if count < len(values):
        best = np.sort(np.argpartition(values, -count)[-count:])
    return best[np.argsort(-values[best], kind="stable")]


def _with_logprobs(logits: Array, chosen: int, alternatives: int) -> Token:
    most = logits.max()
    norm = float(most) + float(np.log(np.exp(logits - most).sum(dtype=np.float64)))
    best = _largest(logits, alternatives) if alternatives else ()
    return Token(chosen, float(logits[chosen]) - norm, tuple((int(i), float(logits[i]) - norm) for i in best))
