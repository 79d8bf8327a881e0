# SPDX-License-Identifier: BSD-3-Clause
"""Loss and perplexity of base and adapters on given text, in PyTorch."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from QEfficient.contract import BASE
from QEfficient.errors import ConfigError
from QEfficient.testing.check import Check, Facts, Finding, failed, skipped
from QEfficient.testing.reference import Logits, Reference
from QEfficient.testing.report import Measurement, Outcome, Series
from QEfficient.testing.text import number
from QEfficient.testing.workload import Tokens

_MOST_TOKENS = 512
_Z = 2.0


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens of one example; those before ``start`` are the prompt and are not judged. ``asks``: the rest is the answer to it."""

    tokens: Tokens
    start: int
    asks: bool = False


@dataclass(slots=True)
class Quality:
    """Losses of each example, in nats for each judged token, by subject."""

    losses: dict[str, list[float]]
    counts: list[int]
    answers: dict[str, list[bool]] = field(default_factory=dict)
    """Whether greedy decoding gives exactly the answer, of the rows that ask for one."""

    def loss(self, subject: str) -> float:
        """Return the loss over all judged tokens."""
        return float(np.average(self.losses[subject], weights=self.counts))

    def measurements(self) -> list[Measurement]:
        """Return loss and perplexity of each subject."""
        found = []
        for subject in self.losses:
            loss = self.loss(subject)
            found.append(Measurement("pytorch", subject, "eval_loss", loss))
            found.append(Measurement("pytorch", subject, "eval_perplexity", math.exp(min(loss, 700))))
            if self.answers[subject]:
                found.append(Measurement("pytorch", subject, "eval_exact_match", float(np.mean(self.answers[subject]))))
        return found


def read_rows(path: str | Path, encode: Callable[[str], list[int]] | None) -> list[Row]:
    """Read a JSONL file whose rows have ``text``, or ``prompt`` and ``completion``.

    Raises:
        ConfigError: The file is missing, a row is something else, or the base has no tokenizer.
    """
    if not Path(path).is_file():
        raise ConfigError(f"--eval file {str(path)!r} does not exist")
    if encode is None:
        raise ConfigError("--eval needs the base's tokenizer, which could not be loaded")
    rows = []
    for number_, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            rows.append(_row(line, encode, f"{path}, line {number_}"))
    rows = [r for r in rows if len(r.tokens) > r.start]
    if not rows:
        raise ConfigError(f"{path} holds no text to judge")
    return rows


def _row(line: str, encode: Callable[[str], list[int]], where: str) -> Row:
    try:
        content = json.loads(line)
    except ValueError as e:
        raise ConfigError(f"{where} is not JSON: {e}") from e
    if isinstance(content, dict) and isinstance(content.get("text"), str):
        return Row(np.array(encode(content["text"])[:_MOST_TOKENS], dtype=np.int64), 1)
    if isinstance(content, dict) and all(isinstance(content.get(k), str) for k in ("prompt", "completion")):
        prompt = encode(content["prompt"])
        whole = encode(content["prompt"] + content["completion"])[:_MOST_TOKENS]
        return Row(np.array(whole, dtype=np.int64), max(1, len(prompt)), asks=True)
    raise ConfigError(f"{where} must have 'text', or 'prompt' and 'completion'")


def evaluate(
    reference: Reference, rows: list[Row], subjects: tuple[str, ...], notify: Callable[[str], None]
) -> Quality:
    """Return the loss of every subject on every row."""
    losses: dict[str, list[float]] = {}
    answers: dict[str, list[bool]] = {}
    for subject in subjects:
        notify(subject)
        judged = [_judge(reference, subject, row) for row in rows]
        losses[subject] = [loss for loss, _ in judged]
        answers[subject] = [right for (_, right), row in zip(judged, rows, strict=True) if row.asks]
    return Quality(losses, [len(r.tokens) - r.start for r in rows], answers)


def token_losses(logits: Logits, tokens: Tokens) -> npt.NDArray[np.float64]:
    """Return the loss of each token, ``(n,)`` in nats, from the logits ``(n, V)`` that stand before it."""
    exact = logits.astype(np.float64)
    top = exact.max(axis=1, keepdims=True)
    total = top[:, 0] + np.log(np.exp(exact - top).sum(axis=1))
    losses: npt.NDArray[np.float64] = total - exact[np.arange(len(exact)), tokens]
    return losses


def _judge(reference: Reference, subject: str, row: Row) -> tuple[float, bool]:
    """Return the loss, and whether each token is the likeliest behind those before it: then greedy decoding gives them all."""
    logits = reference.logits(subject, row.tokens)[row.start - 1 : -1]
    wanted = row.tokens[row.start :]
    loss = float(token_losses(logits, wanted).mean())
    return loss, bool((logits.argmax(axis=1) == wanted).all())


def _ask_loss(quality: Quality, subject: str) -> Finding:
    loss = quality.loss(subject)
    facts: Facts = {
        "loss": number(loss, "nats"),
        "perplexity": number(math.exp(min(loss, 700))),
        "tokens": sum(quality.counts),
        "rows": len(quality.counts),
    }
    series = (Series("loss", tuple(f"row {i}" for i in range(len(quality.counts))), tuple(quality.losses[subject])),)
    if not math.isfinite(loss):
        return failed("The loss is not finite.", loss, facts)
    said = f"Loss {number(loss)}, perplexity {facts['perplexity']} over {facts['tokens']} tokens"
    if subject == BASE:
        return Finding(Outcome.PASS, f"{said}.", loss, facts, series)
    gains = np.array(quality.losses[BASE]) - np.array(quality.losses[subject])
    error = float(gains.std(ddof=1) / math.sqrt(len(gains))) if len(gains) > 1 else math.inf
    facts["gain over base"] = f"{gains.mean():.3g} ± {_Z * error:.2g} nats"
    if gains.mean() < -_Z * error:
        text = f"{said}; the base has {number(quality.loss(BASE))}: on this text the adapter makes the model worse"
        return Finding(Outcome.WARN, f"{text}. Is it the text that the adapter is for?", loss, facts, series)
    return Finding(Outcome.PASS, f"{said}; the base has {number(quality.loss(BASE))}.", loss, facts, series)


def _ask_answers(quality: Quality, subject: str) -> Finding:
    right, plain = (np.array(quality.answers[n], dtype=float) for n in (subject, BASE))
    if not len(right):
        return skipped("The text has no prompts with answers.")
    facts: Facts = {"answers": len(right), "exact": int(right.sum())}
    said = f"{int(right.sum())} of {len(right)} answers are exactly the given ones"
    if subject == BASE:
        return Finding(Outcome.PASS, f"{said}.", float(right.mean()), facts)
    gains = right - plain
    error = float(gains.std(ddof=1) / math.sqrt(len(gains))) if len(gains) > 1 else math.inf
    said = f"{said}; the base has {int(plain.sum())}"
    if gains.mean() < -_Z * error and gains.mean() < 0:
        return Finding(Outcome.WARN, f"{said}: the adapter has lost what the base could.", float(right.mean()), facts)
    return Finding(Outcome.PASS, f"{said}.", float(right.mean()), facts)


CHECKS: tuple[Check[Quality], ...] = (
    Check(
        "loss",
        "Loss on the given text",
        "An adapter is to predict its own kind of text better than the base; judged row by row, two standard errors apart.",
        _ask_loss,
        unit="nats",
        of_base=True,
    ),
    Check(
        "answers",
        "Answers on the given text",
        "Exact match under greedy decoding, of rows with prompt and completion; two standard errors apart from the base, row by row.",
        _ask_answers,
        unit="exact",
        of_base=True,
    ),
)
"""Asked of the base and of each adapter if text is given."""
