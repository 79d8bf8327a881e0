# SPDX-License-Identifier: BSD-3-Clause
"""Greedy tokens against PyTorch's, each for the same prefix.

PyTorch reads prompt and continuation in one pass and says for every token what it would have chosen there. So a near-tie
ends nothing: the tokens behind it are judged as well, and one pass replaces a whole generation in PyTorch.
"""

from dataclasses import dataclass

import numpy as np

from QEfficient.testing.candidate import Candidate
from QEfficient.testing.check import Facts, Finding, skipped
from QEfficient.testing.compare import LOGITS_TOLERANCE
from QEfficient.testing.report import Outcome, Series
from QEfficient.testing.text import number
from QEfficient.testing.workload import Tokens


@dataclass(frozen=True, slots=True)
class _Row:
    """How one row's continuation compares.

    Attributes:
        lead: How far PyTorch puts its own choice above the chosen token, relative to the logits' range; 0 where they agree.
        chosen: The engine's tokens.
        wanted: PyTorch's choice for the same prefix.
    """

    lead: np.ndarray[tuple[int, ...], np.dtype[np.float64]]
    chosen: Tokens
    wanted: Tokens


def ask_greedy(candidate: Candidate, subject: str) -> Finding:
    """Compare the continuation of the longest prompt, alone in its batch."""
    return _ask(candidate, subject, candidate.workload.prompts[:1])


def ask_greedy_batch(candidate: Candidate, subject: str) -> Finding:
    """Compare the continuations of all prompts, in one batch."""
    return _ask(candidate, subject, candidate.workload.prompts)


def _ask(candidate: Candidate, subject: str, prompts: list[Tokens]) -> Finding:
    count = candidate.workload.greedy_tokens
    if count < 1:
        return skipped("The base's context has no room for new tokens.")
    chosen = candidate.greedy(subject, prompts, count)
    rows = [_judge(candidate, subject, p, c) for p, c in zip(prompts, chosen, strict=True)]
    total = len(rows) * count
    equal = sum(int((r.chosen == r.wanted).sum()) for r in rows)
    wrong = [(i, int(t)) for i, r in enumerate(rows) for t in np.flatnonzero(~(r.lead <= 2 * LOGITS_TOLERANCE))]
    facts: Facts = {"tokens": total, "equal": equal, "near-ties": total - equal - len(wrong)}
    steps = tuple(f"row {i}, token {t}" for i in range(len(rows)) for t in range(count))
    series = (Series("how far PyTorch prefers another token", steps, tuple(float(v) for r in rows for v in r.lead)),)
    if wrong:
        text = f"{len(wrong)} of {total} tokens are not PyTorch's. First: {_explain(rows, *wrong[0])}; not a near-tie."
        return Finding(Outcome.FAIL, text, len(wrong), facts, series)
    if equal < total:
        first = next((i, int(np.flatnonzero(r.lead)[0])) for i, r in enumerate(rows) if r.lead.any())
        text = f"{equal} of {total} tokens are PyTorch's, the others near-ties. First: {_explain(rows, *first)}."
        return Finding(Outcome.PASS, text, 0, facts, series)
    return Finding(Outcome.PASS, f"All {total} tokens are PyTorch's.", 0, facts, series)


def _judge(candidate: Candidate, subject: str, prompt: Tokens, chosen: Tokens) -> _Row:
    known = candidate.reference.judged
    key = (subject, np.concatenate([prompt, chosen]).tobytes())
    if key not in known:
        known[key] = _compare(candidate, subject, prompt, chosen)
    row: _Row = known[key]
    return row


def _compare(candidate: Candidate, subject: str, prompt: Tokens, chosen: Tokens) -> _Row:
    whole = np.concatenate([prompt, chosen[:-1]])
    logits = candidate.reference.logits(subject, whole, keep=len(chosen)).astype(np.float64)
    wanted = logits.argmax(axis=1)
    at = np.arange(len(chosen))
    lead = (logits[at, wanted] - logits[at, chosen]) / np.maximum(np.ptp(logits, axis=1), np.finfo(np.float32).tiny)
    return _Row(lead, chosen, wanted)


def _explain(rows: list[_Row], row: int, token: int) -> str:
    found = rows[row]
    gap = number(float(found.lead[token]))
    return (
        f"row {row}, token {token} is {found.chosen[token]}, PyTorch's is {found.wanted[token]}, "
        f"which PyTorch puts {gap} of the logits' range above it"
    )
