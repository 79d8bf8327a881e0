# SPDX-License-Identifier: BSD-3-Clause
"""Checks of what an engine keeps between calls: the cache layer by layer, its last position, long rows, slots used again."""

import numpy as np

from QEfficient.contract import Manifest
from QEfficient.testing.candidate import Candidate, prefill
from QEfficient.testing.check import Check, Finding, failed, passed, skipped
from QEfficient.testing.compare import LOGITS_TOLERANCE, Logits, apart
from QEfficient.testing.report import Outcome, Series
from QEfficient.testing.text import number
from QEfficient.testing.workload import Tokens

_LONG = 320
_TAIL = 4
_SLOT_TOLERANCE = 1e-5


def layer_errors(candidate: Candidate, subject: str) -> list[tuple[str, float]] | None:
    """Compare what each layer keeps of the first prompt with PyTorch; None if the engine does not show it.

    Returns:
        ``("layer 3 key", error)`` in order, errors relative to the range of PyTorch's values.
    """
    candidate.first_logits(subject)
    states: dict[str, Logits] = getattr(candidate.session, "_states", None) or {}
    prompt = candidate.workload.prompts[0]
    want = candidate.reference.cache(subject, prompt)
    names = [(f"past_key.{i}", f"past_value.{i}") for i in want]
    if not want or any(n not in states for pair in names for n in pair):
        return None
    skip = candidate.reference.virtual_tokens(subject)  # compared as well: they are part of what is kept
    end = skip + len(prompt)
    found = []
    for pair, (i, values) in zip(names, want.items(), strict=True):
        for name, kind, value in zip(pair, ("key", "value"), values, strict=True):
            expected = value[:, -end:]
            got = states[name][0][:, end - expected.shape[1] : end]
            span = max(float(np.ptp(expected)), float(np.finfo(np.float32).tiny))
            found.append((f"layer {i} {kind}", float(np.abs(got - expected).max()) / span))
    return found


def _ask_layers(candidate: Candidate, subject: str) -> Finding:
    found = layer_errors(candidate, subject)
    if found is None:
        return skipped("The engine does not show what its layers keep.")
    series = (Series("difference by layer", tuple(n for n, _ in found), tuple(e for _, e in found)),)
    wrong = [(n, e) for n, e in found if not e <= LOGITS_TOLERANCE]
    worst = max((e for _, e in found), default=0.0)
    if not wrong:
        text = (
            f"Keys and values of all {len(found) // 2} layers are within {number(worst)} of their range of PyTorch's."
        )
        return Finding(Outcome.PASS, text, worst, series=series)
    name, error = wrong[0]
    text = f"{name} is the first that differs from PyTorch, by {number(error)} of its range; {len(wrong)} of {len(found)} do"
    before = "its input, so the embedding" if name.startswith("layer 0") else "the layer before it"
    return Finding(
        Outcome.FAIL, f"{text}. Look at that layer's projections and positions, or at {before}.", worst, series=series
    )


def _ask_long(candidate: Candidate, subject: str) -> Finding:
    room = Manifest.read(candidate.folder).max_positions or _LONG
    if room <= 2 * max(candidate.workload.prompt_lengths):
        return skipped(f"The base's context, {room} positions, is covered by the other checks.")
    row = long_row(candidate, min(_LONG, room - candidate.reference.virtual_tokens(subject)))
    want = candidate.reference.last_logits(subject, row, _TAIL)
    candidate.session.set_adapter(subject)
    candidate.session.allocate(1, len(row))
    start = len(row) - _TAIL
    prefill(candidate.session, [row[:start]])
    got = [candidate.session.run(row[None, p : p + 1], np.array([[p]]))[0, -1] for p in range(start, len(row))]
    error = apart(np.stack(got), want)
    if error <= LOGITS_TOLERANCE:
        return passed(
            f"The last tokens of {len(row)} that fill the cache are within {number(error)} of the range.", error
        )
    text = f"At the end of {len(row)} tokens, which fill the cache, logits differ by {number(error)} of their range"
    return failed(f"{text}. Look at the mask, at sliding windows, and at the rotary embedding's scaling.", error)


def long_row(candidate: Candidate, length: int) -> Tokens:
    """Return tokens of the workload, one row after the other, repeated up to a length."""
    return np.resize(np.concatenate(candidate.workload.rows), length)


def _ask_slots(candidate: Candidate, subject: str) -> Finding:
    prompts = [p[: min(12, len(p))] for p in candidate.workload.prompts[:3]]
    first, second, third = prompts[0], prompts[-1], prompts[1]
    session = candidate.session
    session.set_adapter(subject)
    session.allocate(2, candidate.workload.ctx_len)
    fresh = prefill(session, [third, second])
    session.allocate(2, candidate.workload.ctx_len)
    prefill(session, [first, second])
    taken = _take_slot(candidate, third, second)
    error = apart(taken[None], fresh[0][-1].logits[None])
    if error <= _SLOT_TOLERANCE:
        return passed("A slot that another sequence used gives what a fresh one gives.", error)
    text = f"A new sequence in a used slot gives logits that differ by {number(error)} of their range from those of a fresh slot"
    return failed(f"{text}. What the earlier sequence left in the cache is attended to.", error)


def _take_slot(candidate: Candidate, new: Tokens, running: Tokens) -> Logits:
    """Start a sequence in the first slot without emptying the cache, while the second repeats its last token."""
    ids = np.zeros((2, len(new)), dtype=np.int64)
    positions = np.full_like(ids, -1)
    ids[0], positions[0] = new, np.arange(len(new))
    ids[1, 0], positions[1, 0] = running[-1], len(running) - 1
    logits: Logits = candidate.session.run(ids, positions)[0, -1]
    return logits


def _ask_neighbours(candidate: Candidate, subject: str) -> Finding:
    one, *others = [p[: min(12, len(p))] for p in candidate.workload.prompts]
    session = candidate.session
    session.set_adapter(subject)
    said = []
    for other in others[:2]:
        session.allocate(2, candidate.workload.ctx_len)
        said.append(prefill(session, [one, other])[0][-1].logits)
    error = apart(said[1][None], said[0][None])
    if error <= _SLOT_TOLERANCE:
        return passed("A row's logits do not depend on the row beside it.", error)
    text = f"With another row beside it a row's logits move by {number(error)} of their range"
    return failed(f"{text}. Rows of a batch leak into each other: look at masks, and at sums over the batch.", error)


_ROUNDING = "Batches of other shapes may add in another order: below 1e-05 of the logits' range."
CHECKS: tuple[Check[Candidate], ...] = (
    Check("layers", "Keys and values of every layer", "The first layer whose cache differs is where to look; rounding grows from layer to layer and stays below 1e-04.", _ask_layers, LOGITS_TOLERANCE, "of values' range", of_base=True),
    Check("long", "Long row up to the last position", "Positions, masks and windows go wrong far from the start, and the last place of the cache is the easiest to miss.", _ask_long, LOGITS_TOLERANCE, "of range", of_base=True),
    Check("slots", "Used slot is like a fresh one", _ROUNDING, _ask_slots, _SLOT_TOLERANCE, "of range moved", of_base=True),
    Check("neighbours", "Rows do not see each other", _ROUNDING, _ask_neighbours, _SLOT_TOLERANCE, "of range moved", of_base=True),
)  # fmt: skip
"""Asked of the graph and of the program, for the base and each adapter."""
