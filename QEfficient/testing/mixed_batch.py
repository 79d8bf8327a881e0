# SPDX-License-Identifier: BSD-3-Clause
"""A mixed batch through the engine that serves, and each answer against PyTorch's for the same tokens.

First adapters have other tensors under their names: while their requests run they are unloaded and the right ones loaded, and the requests
must end with what they began with. Then, with the right ones, more requests than rows: rows are used again, requests move, long
prompts are read in chunks while others leave, and prompts begin with what an earlier one left. Knows no check.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from QEfficient.contract import BASE
from QEfficient.runtime.engine import Engine
from QEfficient.runtime.requests import Request, Stream, Token
from QEfficient.testing.candidate import Tensors
from QEfficient.testing.compare import LOGITS_TOLERANCE, TOP, Logits
from QEfficient.testing.reference import Reference
from QEfficient.testing.workload import Tokens

_SHORT = 12
"""Tokens of the short prompt: an engine keeps prompts of 8 and more for others that begin alike."""
_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What the engine said to one request.

    Attributes:
        subject: Whose tensors must have answered: the adapter's name, or another's if it was replaced meanwhile.
        request: What was asked.
        stream: What came.
        replaced: The request's adapter was replaced while it ran.
        errors: How far the probabilities of each token are from PyTorch's, relative to the range of the logits there; infinite where a
            token is missing.
        like: Another subject whose answer the first wrong token is much nearer to; ``""`` if there is none.
        alone: The largest error of the same request without others, if the answer is wrong.
    """

    subject: str
    request: Request
    stream: Stream
    replaced: bool = False
    errors: tuple[float, ...] = ()
    like: str = ""
    alone: float = float("inf")

    @property
    def worst(self) -> float:
        """The largest error."""
        return max(self.errors)

    @property
    def right(self) -> bool:
        """Whether every token is within the tolerance."""
        return self.worst <= LOGITS_TOLERANCE


def run_mixed(
    make_engine: Callable[[], Engine], adapters: Mapping[str, Tensors], reference: Reference
) -> list[Answer] | None:
    """Run and judge a mixed batch of these adapters and the base.

    Args:
        make_engine: Opens the program; a second time if an answer is wrong, to ask it alone.
        adapters: What each adapter's inputs are.
        reference: PyTorch + PEFT.

    Returns:
        The answers; None if the program mixes no adapters.
    """
    workload, truths = reference.workload, _Truths(reference)
    short, long = workload.prompts[2][:_SHORT], workload.prompts[0]
    engine = make_engine()
    if not engine.mixed:
        return None
    with engine:
        answers = _replaced(engine, adapters, short, workload.ctx_len)
        answers += _crowded(engine, (*adapters, BASE), short, long, workload.ctx_len)
    for answer in sorted(answers, key=lambda a: -len(a.stream.tokens)):  # the longest first: others begin with it
        truths.of(answer.subject, _row(answer))
    judged = [replace(a, errors=truths.errors(a)) for a in answers]
    if all(a.right for a in judged):
        return judged
    with make_engine() as alone:
        for name, tensors in adapters.items():
            alone.load_adapter(name, tensors)
        return [a if a.right else _explained(alone, a, truths, (*adapters, BASE)) for a in judged]


def _replaced(engine: Engine, adapters: Mapping[str, Tensors], prompt: Tokens, room: int) -> list[Answer]:
    """Replace every adapter while a request of each runs; the last to begin counts the tokens until then."""
    names = list(adapters)
    old = dict(zip(names, [*names[1:], names[0] if len(names) > 1 else BASE], strict=True))
    for name in names:
        engine.load_adapter(name, adapters[old[name]] if old[name] != BASE else _neutral(adapters[name]))
    answers = []
    for i, name in enumerate((*names, BASE)):
        request = _request(prompt, name, 6 + len(names) - i, room)
        answers.append(Answer(old.get(name, BASE), request, engine.submit(request), replaced=name != BASE))

    def count(token: Token | None) -> None:
        so_far = len(answers[-1].stream.tokens)
        if token is not None and so_far == 2:
            for name in names:
                engine.unload_adapter(name)
        if token is not None and so_far == 3:
            for name in names:
                engine.load_adapter(name, adapters[name])

    answers[-1].stream.on_token = count
    engine.start()
    _wait(answers)
    return answers


def _neutral(tensors: Tensors) -> Tensors:
    """Return an adapter of the same shapes that changes nothing."""
    return {name: np.zeros_like(tensor) for name, tensor in tensors.items()}


def _crowded(engine: Engine, names: Sequence[str], short: Tokens, long: Tokens, room: int) -> list[Answer]:
    """Ask three requests of each, of different lengths: they leave one after the other, and others take their rows."""
    requests = [_request(short, name, 2 + i % 3, room) for i, name in enumerate(names)]
    requests += [_request(long, name, 5, room) for name in names]
    requests += [_request(short, name, 6, room) for name in names]
    streams = engine.submit_all(requests)
    answers = [Answer(r.adapter, r, s) for r, s in zip(requests, streams, strict=True)]
    _wait(answers)
    return answers


def _request(prompt: Tokens, adapter: str, tokens: int, room: int) -> Request:
    return Request(
        prompt_ids=prompt.tolist(), adapter=adapter, max_new_tokens=min(tokens, room - len(prompt)), logprobs=TOP
    )


def _wait(answers: Sequence[Answer]) -> None:
    for answer in answers:
        if not answer.stream.wait(_SECONDS):
            answer.stream.cancel()


def _row(answer: Answer) -> Tokens:
    """Return the tokens that the answer's were computed from: prompt and answer, but for the last."""
    return np.array([*answer.request.prompt_ids, *(t.id for t in answer.stream.tokens[:-1])], np.int64)


def _explained(engine: Engine, answer: Answer, truths: "_Truths", subjects: Sequence[str]) -> Answer:
    """Find out whose answer a wrong one is near to, and how right it is alone."""
    at = next(i for i, e in enumerate(answer.errors) if not e <= LOGITS_TOLERANCE)
    others = {s: truths.errors(answer, s)[at] for s in subjects if s != answer.subject}
    nearest = min(others, key=others.__getitem__)
    request = replace(answer.request, adapter=answer.subject)
    again = replace(answer, request=request, stream=engine.submit(request))
    _wait([again])
    near = nearest if 3 * others[nearest] < answer.errors[at] else ""
    return replace(answer, like=near, alone=max(truths.errors(again)))


class _Truths:
    """PyTorch's logits behind each token of an answer; answers that begin alike are computed once."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._kept: dict[str, list[tuple[Tokens, Logits]]] = {}

    def of(self, subject: str, row: Tokens) -> Logits:
        """Return the logits ``(tokens, V)`` of a row."""
        for known, logits in self._kept.setdefault(subject, []):
            if len(known) >= len(row) and np.array_equal(known[: len(row)], row):
                return logits[: len(row)]
        logits = self._reference.logits(subject, row)
        self._kept[subject].append((row, logits))
        return logits

    def errors(self, answer: Answer, subject: str = "") -> tuple[float, ...]:
        """Return the error of each token that was asked for, held against a subject; default: the right one."""
        tokens = answer.stream.tokens
        missing = (float("inf"),) * (answer.request.max_new_tokens - len(tokens))
        if not tokens:
            return missing
        want = self.of(subject or answer.subject, _row(answer))[-len(tokens) :].astype(np.float64)
        return tuple(_error(t, logits) for t, logits in zip(tokens, want, strict=True)) + missing


def _error(token: Token, want: Logits) -> float:
    """Return by how much a token and the likeliest ones beside it are off, relative to the range of PyTorch's logits."""
    span = max(float(np.ptp(want)), float(np.finfo(np.float32).tiny))
    ids = [i for i, _ in token.top_logprobs]
    logprobs = want - want.max()
    logprobs -= np.log(np.exp(logprobs).sum())
    apart = np.abs(np.array([p for _, p in token.top_logprobs]) - logprobs[ids]).max()
    chosen = want.max() - want[token.id]  # greedy: must be the likeliest, up to a tie
    return float(max(apart, chosen if chosen > 2 * LOGITS_TOLERANCE * span else 0.0)) / span
