# SPDX-License-Identifier: BSD-3-Clause
"""Is a row of a mixed batch what its request would be alone? Asked of the program that is compiled to mix adapters."""

import functools
from collections.abc import Sequence

from QEfficient.contract import BASE, Manifest
from QEfficient.testing.candidate import Candidate
from QEfficient.testing.check import Check, Facts, Finding, skipped
from QEfficient.testing.compare import LOGITS_TOLERANCE
from QEfficient.testing.mixed_batch import Answer, run_mixed
from QEfficient.testing.report import Outcome, Series
from QEfficient.testing.text import counted, listed, number

_GROUP = 6
"""Most adapters of one batch; the base comes on top."""
_MEND = "Until that is mended, compile without `mixed`: an engine then makes one call for each adapter."


def _ask(candidate: Candidate, subject: str) -> Finding:
    if candidate.compile_mixed is None:
        return skipped("Only of a program that was compiled here.")
    names = list(candidate.fitted)
    start = names.index(subject) // _GROUP * _GROUP if subject != BASE else 0
    group = tuple(names[start : start + _GROUP])
    if group not in candidate.mixed:
        candidate.mixed[group] = _answers(candidate, group)
    found = candidate.mixed[group]
    if found is None:
        return skipped(
            "No program of this graph mixes adapters in one call, because not all of the adapter's tensors are pairs of LoRA's: an "
            "engine makes one call for each adapter."
        )
    return _finding([a for a in found if a.request.adapter == subject], group)


def _answers(candidate: Candidate, group: Sequence[str]) -> list[Answer] | None:
    specs = Manifest.read(candidate.folder).adapter
    if candidate.compile_mixed is None or any(s.shape and "rank" not in s.shape for s in specs):
        return None  # known without compiling
    workload, program = candidate.workload, candidate.compile_mixed()
    make_engine = functools.partial(
        candidate.make_engine,
        program,
        slots=max(3, len(group) + 1),
        ctx_len=workload.ctx_len,
        chunk_len=max(2, workload.chunk // 2),
    )
    return run_mixed(make_engine, {n: candidate.fitted[n] for n in group}, candidate.reference)


def _finding(found: Sequence[Answer], group: Sequence[str]) -> Finding:
    """Say what came of one subject's requests."""
    names = [f"request {i}, token {at}" for i, a in enumerate(found) for at in range(len(a.errors))]
    series = (Series("difference", tuple(names), tuple(e for a in found for e in a.errors)),)
    facts: Facts = {"requests": len(found), "tokens": len(names), "in one batch": listed([*group, BASE], 8)}
    worst, wrong = max(a.worst for a in found), [a for a in found if not a.right]
    beside = f"in one batch with {counted(len(group), 'adapter')} and the base"
    if not wrong:
        text = f"{counted(len(found), 'request')} {beside} are within {number(worst)} of the range of PyTorch's."
        return Finding(Outcome.PASS, text, worst, facts, series)
    text = f"{len(wrong)} of {counted(len(found), 'request')} {beside} are wrong. {_says(wrong[0])}"
    return Finding(Outcome.FAIL, text, worst, facts, series)


def _says(answer: Answer) -> str:
    """Say where and how an answer is wrong, and what to do."""
    stream, prompt = answer.stream, len(answer.request.prompt_ids)
    when = "whose adapter was replaced while it ran" if answer.replaced else f"with a prompt of {prompt} tokens"
    at = next(i for i, e in enumerate(answer.errors) if not e <= LOGITS_TOLERANCE)
    if stream.error is not None:
        error = f"{type(stream.error).__name__}: {str(stream.error).strip() or 'no message'}"
        return f"One {when} ended with an error behind {counted(at, 'token')}: {error}. {_MEND}"
    if at == len(stream.tokens):
        asked = answer.request.max_new_tokens
        return f"One {when} got {counted(at, 'token')} of {asked}; it ended as {stream.finish_reason!r}. {_MEND}"
    text = f"One {when} is off by {number(answer.errors[at])} of the range at its token {at}"
    if answer.like:
        return (
            f"{text}: that is much nearer to what {answer.like!r} answers: the row ran with another's tensors. {_MEND}"
        )
    if answer.alone <= LOGITS_TOLERANCE:
        return f"{text}; alone it is right, so rows beside it, or before it in the same slot, reach it. {_MEND}"
    return f"{text}, alone by {number(answer.alone)}: if program.prefill and program.decode pass, look at the engine. {_MEND}"


CHECKS: tuple[Check[Candidate], ...] = (
    Check(
        "mixed",
        "A mixed batch is each request alone",
        "Float32 engines that add in another order stay below 1e-05 of the logits' range; a row of another adapter, position or slot is far above 1e-04.",
        _ask,
        LOGITS_TOLERANCE,
        "of range",
        of_base=True,
    ),
)
"""Asked of the program, for the base and each adapter; one run answers for all in the batch."""
