# SPDX-License-Identifier: BSD-3-Clause
"""The next token from logits, for one row at a time: nothing here depends on other rows."""

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt

from QEfficient.runtime.requests import Request, Sampling, Token

Array = npt.NDArray[Any]


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
            chosen = self._draw(scores.astype(np.float64) / sampling.temperature, sampling)
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
        kept = np.arange(len(scores))
        if 0 < sampling.top_k < len(scores):
            kept = np.argpartition(scores, -sampling.top_k)[-sampling.top_k :]
        kept = kept[np.argsort(-scores[kept], kind="stable")]
        weights = np.exp(scores[kept] - scores[kept[0]])
        weights /= weights.sum()
        if sampling.top_p < 1:
            count = int(np.searchsorted(np.cumsum(weights), sampling.top_p)) + 1
            kept, weights = kept[:count], weights[:count] / weights[:count].sum()
        at = int(np.searchsorted(np.cumsum(weights), self._random.random(), side="right"))
        return int(kept[min(at, len(kept) - 1)])


def _with_logprobs(logits: Array, chosen: int, alternatives: int) -> Token:
    wide = logits.astype(np.float64)
    logprobs = wide - wide.max()
    logprobs -= np.log(np.exp(logprobs).sum())
    best: Array = np.empty(0, np.int64)
    if alternatives:
        count = min(alternatives, len(logprobs))
        best = np.argpartition(logprobs, -count)[-count:]
        best = best[np.argsort(-logprobs[best], kind="stable")]
    return Token(chosen, float(logprobs[chosen]), tuple((int(i), float(logprobs[i])) for i in best))
