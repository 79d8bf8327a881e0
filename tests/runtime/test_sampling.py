# SPDX-License-Identifier: BSD-3-Clause
"""The next token from logits, held against the same rules written down in float64 with everything sorted."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from QEfficient.runtime.requests import Request, Sampling
from QEfficient.runtime.sampling import Chooser

VOCAB = 3000


def logits(seed: int, spread: float) -> npt.NDArray[np.float32]:
    """Return random logits; the greater the spread, the fewer tokens share the probability."""
    return (np.random.default_rng(seed).standard_normal(VOCAB) * spread).astype(np.float32)


def kept(scores: npt.NDArray[np.float64], sampling: Sampling) -> npt.NDArray[np.float64]:
    """Return the probabilities that remain, ``(V,)``."""
    order = np.argsort(-scores, kind="stable")
    order = order[: sampling.top_k or VOCAB]
    weights = np.exp(scores[order] - scores[order[0]])
    weights /= weights.sum()
    order = order[: int(np.searchsorted(np.cumsum(weights), sampling.top_p)) + 1]
    weights = weights[: len(order)] / weights[: len(order)].sum()
    whole = np.zeros(VOCAB)
    whole[order] = weights
    return whole


@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0])  # a nucleus of 2,000 tokens, of 400, and of a few
@pytest.mark.parametrize(
    "fields",
    [{}, {"top_p": 0.9}, {"top_k": 40}, {"top_k": 40, "top_p": 0.5}, {"top_p": 0.999999}, {"top_k": VOCAB}],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_draws_are_those_of_the_rules(fields: dict[str, float], temperature: float, spread: float) -> None:
    """Each draw falls on the token whose share of what is kept holds the request's random number."""
    for seed in range(20):
        scores = logits(seed, spread)
        sampling = Sampling(temperature=temperature, seed=seed, **fields)  # type: ignore[arg-type]
        shares = kept(scores.astype(np.float64) / temperature, sampling)
        right = int(np.searchsorted(np.cumsum(shares), np.random.default_rng(seed).random(), side="right"))
        assert Chooser(Request(prompt_ids=[1], max_new_tokens=1, sampling=sampling)).choose(scores).id == right


def test_all_tokens_come_as_often_as_they_should() -> None:
    """40,000 draws of one request have the frequencies of its probabilities."""
    scores = np.array([1.0, 3.0, -2.0, 2.0, -np.inf], np.float32)
    chooser = Chooser(Request(prompt_ids=[1], max_new_tokens=1, sampling=Sampling(temperature=1.0, seed=1)))
    counts = np.bincount([chooser.choose(scores).id for _ in range(40_000)], minlength=5) / 40_000
    assert counts == pytest.approx(torch.from_numpy(scores).softmax(0).numpy(), abs=0.01)
    assert counts[4] == 0


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-60, 5e-324])
def test_cold_draws_take_the_likeliest(temperature: float) -> None:
    """However small a temperature is, no number overflows."""
    scores = logits(3, 2.0)
    chooser = Chooser(Request(prompt_ids=[1], max_new_tokens=1, sampling=Sampling(temperature=temperature, seed=1)))
    assert {chooser.choose(scores).id for _ in range(20)} == {int(scores.argmax())}


@pytest.mark.parametrize("spread", [0.5, 30.0])
def test_log_probabilities_are_pytorchs(spread: float) -> None:
    """Of the chosen token and of the likeliest ones, in their order."""
    scores = logits(5, spread)
    right = torch.from_numpy(scores).double().log_softmax(0)
    sampling = Sampling(temperature=1.5, seed=2)
    token = Chooser(Request(prompt_ids=[1], max_new_tokens=1, sampling=sampling, logprobs=4)).choose(scores)
    assert token.logprob == pytest.approx(float(right[token.id]), abs=1e-5)
    values, ids = right.topk(4)
    assert [i for i, _ in token.top_logprobs] == ids.tolist()
    assert [p for _, p in token.top_logprobs] == pytest.approx(values.tolist(), abs=1e-5)
