# SPDX-License-Identifier: BSD-3-Clause
"""Checks of a graph, and of the program made from it, against PyTorch + PEFT in float32.

The same questions are asked of both. Only attended positions are compared: under padding PyTorch's own kernels differ.
"""

from collections.abc import Callable

import numpy as np

from QEfficient.contract import BASE, Manifest
from QEfficient.errors import ArtifactError
from QEfficient.export.skeleton import longest_context
from QEfficient.store import verify_files
from QEfficient.testing import checks_state
from QEfficient.testing.candidate import SCENARIOS, Candidate
from QEfficient.testing.check import Check, Facts, Finding, failed, passed, skipped
from QEfficient.testing.checks_tokens import ask_greedy, ask_greedy_batch
from QEfficient.testing.compare import (
    EFFECT_TOLERANCE,
    FLOAT32_NOISE,
    KL_TOLERANCE,
    LOGITS_TOLERANCE,
    TOP,
    Difference,
    joined,
    says_gain,
)
from QEfficient.testing.features import ask_features
from QEfficient.testing.report import Outcome, Series, Stage
from QEfficient.testing.text import counted, listed, number

_FLOAT32 = (
    "Float32 engines that add in another order stay below 1e-05 of the logits' range; a wrong model is far above 1e-04."
)


def _ask_integrity(candidate: Candidate, subject: str) -> Finding:
    manifest = Manifest.read(candidate.folder)
    longest = longest_context(candidate.reference.model)
    if manifest.max_positions and longest and manifest.max_positions != longest:
        text = (
            f"The manifest says that the base takes {manifest.max_positions} positions, the base itself takes {longest}"
        )
        return failed(f"{text}: a session refuses what the base can do, or the other way round. Export again.")
    try:
        verify_files(candidate.folder, manifest.files, full=True)
    except ArtifactError as e:
        return failed(f"The folder is not what was written: {str(e).replace(f'{candidate.folder}/', '')}")
    read = sum(int(f["bytes"]) for f in manifest.files.values())
    return passed(f"{counted(len(manifest.files), 'file')} have the digests that were recorded.", facts={"bytes": read})


def _ask_tensors(candidate: Candidate, subject: str) -> Finding:
    exported, fitted = candidate.exported.get(subject), candidate.fitted[subject]
    if subject in candidate.broken:
        return failed(f"The adapter in the graph folder cannot be used: {candidate.broken[subject]}")
    if exported is None:
        return skipped("The graph folder holds no such adapter; the adapter's own folder is used.")
    wrong = _differing(exported, fitted)
    if not wrong:
        return passed(f"All {len(fitted)} tensors are those of the adapter's folder.", 0)
    twin = next((n for n in candidate.names if n != subject and not _differing(exported, candidate.fitted[n])), None)
    if twin is not None:
        text = f"The graph's adapter {subject!r} holds the tensors of {twin!r}: the two were swapped. Export again."
        return failed(text, len(wrong))
    scalings = [key for key in wrong if key.endswith(".scaling")]
    if len(scalings) == len(wrong):
        ours, theirs = (float(t[wrong[0]]) for t in (exported, fitted))
        text = f"The graph scales the adapter by {ours:g}, its configuration now says {theirs:g} (lora_alpha, r or use_rslora"
        return failed(
            f"{text} was changed after the export, in {counted(len(wrong), 'module')}). Export again.", len(wrong)
        )
    facts: Facts = {"differ": listed(wrong, 8)}
    text = f"{len(wrong)} of {len(fitted)} tensors differ from the adapter's folder, first {wrong[0]}. Export again."
    return Finding(Outcome.FAIL, text, len(wrong), facts)


def _asks_logits(scenario: str) -> Callable[[Candidate, str], Finding]:
    def ask(candidate: Candidate, subject: str) -> Finding:
        found = candidate.compare(scenario, subject)
        if found.error <= LOGITS_TOLERANCE:
            text = f"Within {number(found.error)} of the logits' range of PyTorch's."
            if subject == BASE and (why := candidate.reference.base_moved):
                text += f" PyTorch's without the adapter is not the bare base, PEFT's own limit: {why}."
            return _with_plot(Outcome.PASS, text, found)
        at = f"at {found.labels[found.worst]} (token {found.tokens[found.worst]})"
        text = f"Logits differ from PyTorch by {number(found.error)} of their range {at}"
        above = int((~(found.errors <= LOGITS_TOLERANCE)).sum())
        text += f"; {above} of {len(found.errors)} positions are off."
        return _with_plot(Outcome.FAIL, f"{text} {_advice(candidate, subject, found)}", found)

    return ask


def _ask_distribution(candidate: Candidate, subject: str) -> Finding:
    found = joined([candidate.compare(s, subject) for s in SCENARIOS])
    order = np.nan_to_num(found.kl, nan=np.inf)
    at, worst, shared = int(order.argmax()), float(found.kl[int(order.argmax())]), float(found.shared.mean())
    facts: Facts = {
        f"of PyTorch's {TOP} most likely tokens": number(100 * shared, "% agree"),
        "median KL": number(float(np.median(order))),
    }
    series = (Series("KL in nats", found.labels, tuple(found.kl.tolist())),)
    if worst <= KL_TOLERANCE and shared == 1.0:
        text = f"The distribution is within {number(worst)} nats of PyTorch's; the {TOP} most likely tokens agree everywhere."
        return Finding(Outcome.PASS, text, worst, facts, series)
    text = f"The distribution is {number(worst)} nats from PyTorch's at {found.labels[at]}, and {number(100 * shared)} % of the {TOP} most likely tokens agree."
    return Finding(Outcome.FAIL, f"{text} {_advice(candidate, subject, found)}", worst, facts, series)


def _ask_effect(candidate: Candidate, subject: str) -> Finding:
    found = joined([candidate.compare(s, subject) for s in SCENARIOS])
    part = found.error / found.effect if found.effect else float("inf")
    facts: Facts = {
        "largest difference": number(found.error, "of range"),
        "adapter's effect": number(found.effect, "of range"),
        "share of the effect that arrives": number(found.gain),
    }
    if found.effect <= FLOAT32_NOISE:
        return skipped("The adapter has no effect in PyTorch that an error could be compared with.")
    if part <= EFFECT_TOLERANCE:
        text = f"The difference is {number(part)} of what the adapter itself changes, so it is the adapter that was compared."
        return Finding(Outcome.PASS, text, part, facts)
    if found.error <= FLOAT32_NOISE and abs(found.gain - 1) < 0.05:
        text = f"The adapter's effect ({number(found.effect)} of the range) is so small that rounding is {number(part)} of it."
        return Finding(Outcome.WARN, text, part, facts)
    text = f"The difference is {number(part)} of what the adapter changes."
    return Finding(Outcome.FAIL, f"{text} {_advice(candidate, subject, found)}", part, facts)


def _ask_switching(candidate: Candidate, subject: str) -> Finding:
    others = [n for n in (*candidate.names, BASE) if n != subject]
    if not others:
        return skipped("There is nothing to switch to.")
    first = candidate.first_logits(subject)
    between = {other: candidate.first_logits(other) for other in others[:2]}
    again = candidate.first_logits(subject)
    moved = float(np.abs(again - first).max())
    if not np.array_equal(first, again):
        text = f"{subject} → {' → '.join(between)} → {subject}: the logits moved by {moved:.3g}."
        return failed(f"{text} Something of the other adapter, or of its cache, stays behind.", moved)
    same = [other for other, logits in between.items() if np.array_equal(first, logits)]
    if same and not _equal_in_pytorch(candidate, subject, same[0]):
        text = f"Switching from {subject!r} to {same[0]!r} changes nothing: both give the same logits, in PyTorch they differ."
        return failed(text, moved)
    return passed(f"{subject} → {' → '.join(between)} → {subject} gives the same bits again.", moved)


def _equal_in_pytorch(candidate: Candidate, one: str, other: str) -> bool:
    last = candidate.workload.prompt_lengths[0] - 1
    a, b = (candidate.reference.workload_logits(n)[0][last] for n in (one, other))
    return bool(np.abs(a - b).max() <= FLOAT32_NOISE * np.ptp(a))


def _with_plot(outcome: Outcome, text: str, found: Difference) -> Finding:
    series = [Series("difference", found.labels, tuple(found.errors.tolist()))]
    if found.effects.size:
        series.append(Series("adapter's effect", found.labels, tuple(found.effects.tolist())))
    return Finding(outcome, text, found.error, {"positions": len(found.errors)}, tuple(series))


def _advice(candidate: Candidate, subject: str, found: Difference) -> str:
    """Say where to look first."""
    if subject == BASE:
        return (
            "The base itself is wrong: look at its weights, and at what the graph takes for no adapter; export again."
        )
    if not candidate.has_base:
        return f"The adapter is baked in: {says_gain(found.gain)}."
    if candidate.compare("prefill", BASE).error > LOGITS_TOLERANCE:
        return "The base is off as well, so the adapter is not the cause."
    if candidate.stage is Stage.PROGRAM:
        return f"The base agrees ({says_gain(found.gain)}); see whether the graph stage fails too."
    return f"The base agrees, so look at the adapter's tensors and scaling ({says_gain(found.gain)})."


def _differing(exported: dict[str, np.ndarray], fitted: dict[str, np.ndarray]) -> list[str]:
    """Return the names of the tensors that are not equal, bit by bit."""
    names = sorted(set(exported) | set(fitted))
    return [n for n in names if n not in exported or n not in fitted or not np.array_equal(exported[n], fitted[n])]


CHECKS: tuple[Check[Candidate], ...] = (
    Check(
        "integrity",
        "Files are as written",
        "A weight that changed on disk changes the answers, and nothing else would say so.",
        _ask_integrity,
        of_base=True,
        of_adapters=False,
    ),
    Check(
        "tensors",
        "Exported tensors are the adapter's",
        "Export copies, so they are equal bit by bit, scalings included.",
        _ask_tensors,
        tolerance=0,
        unit="differing tensors",
    ),
    *(
        Check(name, title, _FLOAT32, _asks_logits(name), LOGITS_TOLERANCE, "of range", of_base=True)
        for name, title in (
            ("prefill", "Logits after a prompt"),
            ("chunked", "Logits of a prompt in chunks"),
            ("decode", "Logits token by token"),
            ("ragged", "Logits of a ragged batch"),
        )
    ),
    Check(
        "distribution",
        "Distribution over tokens",
        "Below 1e-04 nats no set of tokens changes its probability by more than 0.7 %; near-ties may change places.",
        _ask_distribution,
        KL_TOLERANCE,
        "nats",
        of_base=True,
    ),
    Check(
        "effect",
        "Adapter's effect arrives",
        "An error may be small beside the logits and large beside what the adapter does; rounding is far below 1 % of it.",
        _ask_effect,
        EFFECT_TOLERANCE,
        "of the effect",
    ),
    Check(
        "features",
        "No part of the adapter is left out",
        "A tool that does not know DoRA, lora_bias or rsLoRA drops it without an error; PyTorch without it then gives the same logits.",
        ask_features,
        LOGITS_TOLERANCE,
        "of range",
    ),
    Check(
        "greedy",
        "Greedy tokens",
        "Each token must be PyTorch's choice for the same prefix, or one that PyTorch ranks equal within the logits' tolerance.",
        ask_greedy,
        tolerance=0,
        unit="wrong tokens",
        of_base=True,
    ),
    Check(
        "greedy_batch",
        "Greedy tokens of a ragged batch",
        "A row's tokens must not depend on the other rows or on their lengths.",
        ask_greedy_batch,
        tolerance=0,
        unit="wrong tokens",
        of_base=True,
    ),
    Check(
        "switching",
        "Switching there and back",
        "The same program with the same tensors repeats the same additions, so the bits must be equal.",
        _ask_switching,
        tolerance=0,
        of_base=True,
    ),
    *checks_state.CHECKS,
)
"""Asked of the graph and of the program, for the base and each adapter, in this order."""
