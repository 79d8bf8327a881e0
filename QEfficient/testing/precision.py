# SPDX-License-Identifier: BSD-3-Clause
"""A program of rounded weights, judged three ways on given text: float32, PyTorch with the same rounded weights, the program.

Rounding moves every logit, so float32's tolerances say nothing. What rounding alone does is known, though: PyTorch runs with
each weight rounded as the program rounds it. A program of whole numbers may add what rounding activations to 8 bits costs, and no
more; how much that is, rounding the weights to 8 bits tells. One of bfloat16 weights rounds no activations, and may add nothing.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.pytorch_utils import Conv1D

from QEfficient.compile.blocks import BITS, dequantize, quantize
from QEfficient.contract import BASE, Manifest
from QEfficient.testing.candidate import Session
from QEfficient.testing.check import Check, Facts, Finding, failed, skipped
from QEfficient.testing.compare import difference
from QEfficient.testing.quality import Row, token_losses
from QEfficient.testing.reference import Logits, Reference
from QEfficient.testing.report import Measurement, Outcome, Series
from QEfficient.testing.text import number

SAME_BITS = ("integrity", "tensors", "switching")
"""Checks of the program stage that hold at any precision; the others hold the program against float32."""
_MOST_TOKENS = 256
_TIMES = 3.0
_LOSSES = {"bf16": 1.01, "int8": 1.01, "int4": 1.10}
"""Largest ratio of perplexities that is usual: up to 1.0021 (of 256 tokens), 1.0006 and 1.035 were seen."""
_FLOORS = {"bf16": 1e-8, "int8": 1e-6, "int4": 1e-6}
"""What a program may add at least, in nats. In bf16 it is float32's own rounding: 6e-13 was seen, logits that are off by 1e-4 make 5e-9."""


@dataclass(slots=True)
class Rounded:
    """What was found, by subject.

    Attributes:
        precision: ``"bf16"``, ``"int8"`` or ``"int4"``.
        program: Divergence of the program's distribution from float32's at each token, in nats.
        pytorch: The same of PyTorch with rounded weights; empty if the weights could not be told apart.
        added: Divergence of the program's from that of PyTorch with rounded weights.
        eighth: Divergence of PyTorch with weights of 8 bits from float32's: what rounding activations may cost; zeros if none are.
        losses: Loss in float32 and of the program.
    """

    precision: str
    program: dict[str, npt.NDArray[np.float64]]
    pytorch: dict[str, npt.NDArray[np.float64]]
    added: dict[str, npt.NDArray[np.float64]]
    eighth: dict[str, npt.NDArray[np.float64]]
    losses: dict[str, tuple[float, float]]

    def measurements(self) -> list[Measurement]:
        """Return divergence and perplexity of the program for each subject."""
        found = []
        for subject, kl in self.program.items():
            found.append(Measurement("program", subject, "eval_kl", float(kl.mean())))
            found.append(
                Measurement("program", subject, "eval_perplexity", math.exp(min(self.losses[subject][1], 700)))
            )
        return found


def evaluate_rounded(
    reference: Reference,
    session: Session,
    manifest: Manifest,
    rows: Sequence[Row],
    subjects: Sequence[str],
    notify: Callable[[str], None],
) -> Rounded:
    """Compare the program with PyTorch on the first tokens of each row, 256 in all.

    Args:
        reference: PyTorch + PEFT.
        session: The program's, adapters loaded.
        manifest: The program's.
        rows: What is judged.
        subjects: The base and adapters.
        notify: Called with each subject before it is judged.
    """
    parts = _shortened(rows)
    exact = {s: [_judged(reference.logits(s, r.tokens), r) for r in parts] for s in subjects}
    precision = str(manifest.options["precision"])
    near = _with_rounded(reference, manifest, parts, subjects)
    eight = {"bf16": exact, "int8": near}.get(precision) or _with_rounded(reference, manifest, parts, subjects, 8)
    found = Rounded(precision, {}, {}, {}, {}, {})
    for subject in subjects:
        notify(subject)
        ours = [_run(session, subject, row) for row in parts]
        found.program[subject] = _divergence(ours, exact[subject])
        found.losses[subject] = _loss(exact[subject], parts), _loss(ours, parts)
        if near:
            found.pytorch[subject] = _divergence(near[subject], exact[subject])
            found.added[subject] = _divergence(ours, near[subject])
            found.eighth[subject] = _divergence(eight[subject], exact[subject])
    return found


def _with_rounded(
    reference: Reference, manifest: Manifest, rows: list[Row], subjects: Sequence[str], bits: int = 0
) -> dict[str, list[Logits]]:
    """Return PyTorch's logits of the judged tokens with rounded weights; empty if the weights are not in the model by name."""
    with _weights_rounded(reference.model, manifest, bits) as known:
        return {s: [_judged(reference.logits(s, r.tokens), r) for r in rows] for s in subjects if known}


def _shortened(rows: Sequence[Row]) -> list[Row]:
    each = max(2, _MOST_TOKENS // len(rows))
    return [Row(r.tokens[: r.start + each], r.start) for r in rows[: _MOST_TOKENS // 2]]


def _judged(logits: Logits, row: Row) -> Logits:
    return logits[row.start - 1 : -1]


def _run(session: Session, subject: str, row: Row) -> Logits:
    """Return the program's logits of the judged tokens, ``(n, V)``: the prompt in one call, then one token after the other."""
    session.set_adapter(subject)
    session.allocate(1, len(row.tokens))
    said = [session.run(row.tokens[None, : row.start], np.arange(row.start)[None])[0, -1].copy()]
    for at in range(row.start, len(row.tokens) - 1):
        said.append(session.run(row.tokens[None, at : at + 1], np.array([[at]]))[0, -1].copy())
    return np.stack(said)


def _divergence(got: list[Logits], want: list[Logits]) -> npt.NDArray[np.float64]:
    a, b = np.concatenate(got), np.concatenate(want)
    return difference([""] * len(a), a, b).kl


def _loss(logits: list[Logits], rows: list[Row]) -> float:
    tokens = np.concatenate([r.tokens[r.start :] for r in rows])
    return float(token_losses(np.concatenate(logits), tokens).mean())


@contextlib.contextmanager
def _weights_rounded(model: Any, manifest: Manifest, bits: int = 0) -> Iterator[bool]:
    """Round the weights that the program rounded, the way it did; yield False if one of them is not in the model."""
    options, sizes = manifest.options, {n: int(w["bits"]) for n, w in manifest.options.get("quantized", {}).items()}
    modules = {_plain(n): m for n, m in model.named_modules()}
    owners = {n: modules.get(n.rpartition(".")[0]) for n in sizes}
    if not all(isinstance(getattr(m, "weight", None), torch.Tensor) for m in owners.values()):
        yield False
        return
    kept: list[tuple[Any, Any]] = []
    try:
        for name, module in owners.items():
            weight = module.weight  # type: ignore[union-attr] # looked at above
            kept.append((weight, weight.data))
            rows = weight.data.T if isinstance(module, Conv1D) else weight.data
            new = _rounded(rows, bits or sizes[name], options).to(weight.dtype)
            weight.data = new.T if isinstance(module, Conv1D) else new
        yield True
    finally:
        for weight, old in kept:
            weight.data = old


def _rounded(weight: torch.Tensor, bits: int, options: Mapping[str, Any]) -> torch.Tensor:
    """Return a matrix ``(out, in)`` with the numbers that a program of these options holds."""
    if bits == 16:
        return weight.bfloat16()
    array = np.ascontiguousarray(weight.float().numpy())
    parts = quantize(array, bits=bits, block_size=options["block_size"], symmetric=options["symmetric"])
    return torch.from_numpy(dequantize(parts, array.shape[1]))


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.").removesuffix(".base_layer").replace(".base_layer.", ".")


def _ask(found: Rounded, subject: str) -> Finding:
    if subject not in found.pytorch:
        return skipped("The program's weights could not be found in PyTorch's model by name.")
    ours, theirs, added = found.program[subject], found.pytorch[subject], float(found.added[subject].mean())
    exact, loss = found.losses[subject]
    kl, rounding = float(ours.mean()), float(theirs.mean())
    ratio = math.exp(min(loss - exact, 700))
    facts: Facts = {
        "program from float32": number(kl, "nats"),
        "PyTorch with rounded weights from float32": number(rounding, "nats"),
        "program from PyTorch with rounded weights": number(added, "nats"),
        "perplexity in float32": number(math.exp(min(exact, 700))),
        "perplexity of the program": number(math.exp(min(loss, 700))),
        "tokens": len(ours),
    }
    at = tuple(str(i) for i in range(len(ours)))
    series = (Series("program", at, tuple(ours.tolist())), Series("PyTorch, rounded", at, tuple(theirs.tolist())))
    times = added / max(float(found.eighth[subject].mean()), _FLOORS[found.precision])
    said = (
        f"In {found.precision} the distribution is {number(kl)} nats from float32's, PyTorch with the same rounded weights is "
        f"{number(rounding)} from it and {number(added)} from the program; perplexity times {ratio:.4f}"
    )
    if not times <= _TIMES:
        who = "" if subject == BASE else " Does the base alone fail as well? Then it is not the adapter."
        explains = "rounding activations" if found.precision in BITS else "another order of additions"
        text = f"{said}. The last is more than {explains} explains: look for a damaged weight or scale, and compile again.{who}"
        return Finding(Outcome.FAIL, text, times, facts, series)
    if ratio > _LOSSES[found.precision]:
        instead = (
            "keep sensitive weights higher (--keep), or take smaller blocks" if found.precision in BITS else "take fp32"
        )
        text = f"{said}. More than is usual in {found.precision}: {instead}."
        return Finding(Outcome.WARN, text, times, facts, series)
    if not math.isfinite(loss):
        return failed(f"{said}: the loss is not finite.", times, facts)
    return Finding(Outcome.PASS, f"{said}.", times, facts, series)


CHECKS: tuple[Check[Rounded], ...] = (
    Check(
        "precision",
        "Rounded program on the given text",
        "Judged three ways: float32, PyTorch with the same rounded weights, and the program, which at int8 and int4 rounds activations too.",
        _ask,
        _TIMES,
        "times what is expected",
        of_base=True,
    ),
)
"""Asked of the base and of each adapter with ``--precision``."""
