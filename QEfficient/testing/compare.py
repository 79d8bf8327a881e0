# SPDX-License-Identifier: BSD-3-Clause
"""Logits against logits: how far, where, and how much of the adapter's effect arrives. Knows no model."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]

LOGITS_TOLERANCE = 1e-4
"""Largest difference of float32 logits, relative to the range (largest minus smallest) of the logits at that position."""
EFFECT_TOLERANCE = 1e-2
"""Largest difference relative to the adapter's own effect."""
KL_TOLERANCE = 1e-4
"""Largest divergence in nats: no set of tokens changes its probability by more than 0.7 % (Pinsker's inequality)."""
TOP = 5
"""How many of the most likely tokens are compared."""
FLOAT32_NOISE = 1e-5
"""Differences below this part of the range can be rounding: two float32 engines were seen to differ by up to 5e-6."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far ``P`` positions of one engine are from PyTorch.

    Attributes:
        labels: Where each position is, ``"prefill 47"`` for example.
        errors: Largest absolute difference of each position, relative to the range there, ``(P,)``.
        effects: Largest absolute change that the adapter makes at each position, relative to the range, ``(P,)``; empty for the base.
        tokens: The token of the largest difference at each position, ``(P,)``.
        agreement: Sum over positions of the engine's change (against PyTorch's base) times PyTorch's change.
        energy: Sum over positions of PyTorch's change squared.
        kl: Kullback-Leibler divergence of the engine's distribution from PyTorch's at each position, in nats, ``(P,)``.
        shared: How many of PyTorch's most likely tokens are the engine's too, near-ties left out, as a share, ``(P,)``.
    """

    labels: tuple[str, ...]
    errors: npt.NDArray[np.float64]
    effects: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.int64]
    agreement: float = 0.0
    energy: float = 0.0
    kl: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    shared: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    @property
    def worst(self) -> int:
        """Index of the position with the largest difference; one that is not finite counts as the largest."""
        return int(np.argmax(np.nan_to_num(self.errors, nan=np.inf)))

    @property
    def error(self) -> float:
        """Largest difference relative to the range."""
        return float(self.errors[self.worst])

    @property
    def effect(self) -> float:
        """Largest change that the adapter makes, relative to the range."""
        return float(self.effects.max()) if self.effects.size else 0.0

    @property
    def gain(self) -> float:
        """How much of the adapter's effect arrives: 1 is all of it, 0 nothing, 2 twice as much."""
        return self.agreement / self.energy if self.energy else 0.0


def apart(got: Logits, want: npt.NDArray[np.floating[Any]]) -> float:
    """Return the largest difference, relative to the range of the logits at its position, of logits ``(..., V)``."""
    span = np.maximum(np.ptp(want, axis=-1), np.finfo(np.float32).tiny)
    return float((np.abs(got.astype(np.float64) - want).max(axis=-1) / span).max())


def difference(
    labels: list[str], got: Logits, want: Logits, base: Logits | None = None, *, distribution: bool = True
) -> Difference:
    """Compare logits of the same positions.

    Args:
        labels: Where each position is.
        got: The engine's logits, ``(P, V)``.
        want: PyTorch's logits with the adapter, ``(P, V)``.
        base: PyTorch's logits without it, ``(P, V)``; None when the subject is the base.
        distribution: Compare probabilities and most likely tokens as well.
    """
    got64, want64 = got.astype(np.float64), want.astype(np.float64)
    span = np.maximum(want64.max(axis=1) - want64.min(axis=1), np.finfo(np.float32).tiny)
    absolute = np.abs(got64 - want64)
    tokens = np.nan_to_num(absolute, nan=np.inf).argmax(axis=1)
    errors = absolute.max(axis=1) / span
    none = np.zeros(0)
    kl, shared = (_divergence(got64, want64), _shared(got64, want64, span)) if distribution else (none, none)
    if base is None:
        return Difference(tuple(labels), errors, np.zeros(0), tokens, kl=kl, shared=shared)
    change = want64 - base
    effects = np.abs(change).max(axis=1) / span
    agreement, energy = float(np.sum((got64 - base) * change)), float(np.sum(change * change))
    return Difference(tuple(labels), errors, effects, tokens, agreement, energy, kl, shared)


def joined(parts: list[Difference]) -> Difference:
    """Return several comparisons of one subject as one."""
    return Difference(
        tuple(label for p in parts for label in p.labels),
        np.concatenate([p.errors for p in parts]),
        np.concatenate([p.effects for p in parts]),
        np.concatenate([p.tokens for p in parts]),
        sum(p.agreement for p in parts),
        sum(p.energy for p in parts),
        np.concatenate([p.kl for p in parts]),
        np.concatenate([p.shared for p in parts]),
    )


def _divergence(got: npt.NDArray[np.float64], want: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    ours, theirs = (x - x.max(axis=1, keepdims=True) for x in (got, want))
    ours, theirs = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (ours, theirs))
    found: npt.NDArray[np.float64] = np.maximum((np.exp(theirs) * (theirs - ours)).sum(axis=1), 0.0)
    return found


def _shared(
    got: npt.NDArray[np.float64], want: npt.NDArray[np.float64], span: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """A token that PyTorch ranks among its first must be, to the tolerance, among the engine's first."""
    k = min(TOP, got.shape[1])
    chosen = np.argpartition(-want, k - 1, axis=1)[:, :k]
    last = -np.partition(-got, k - 1, axis=1)[:, k - 1 : k]
    found: npt.NDArray[np.float64] = (
        np.take_along_axis(got, chosen, axis=1) >= last - 2 * LOGITS_TOLERANCE * span[:, None]
    ).mean(axis=1)
    return found


def says_gain(gain: float) -> str:
    """Put into words how much of the adapter's effect arrives."""
    if not np.isfinite(gain):
        return "its output is not finite"
    if abs(gain) < 0.05:
        return "none of the adapter's effect arrives"
    if abs(gain - 1) < 0.05:
        return "the adapter is applied, and something is added"
    return f"the adapter's effect arrives {gain:.2f} times"
