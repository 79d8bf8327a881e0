# SPDX-License-Identifier: BSD-3-Clause
"""Several adapters side by side along the rank, and the mask that gives each row its own.

Ranks are not padded, rows of one adapter share its tensors, ``"base"`` is a row of zeros. Adapters that leave stay where they are, masked
out, until their place is needed or too much of the room is theirs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from QEfficient.contract import ADAPTER_MASK, BASE, AdapterSpec

Array = npt.NDArray[Any]

_MOST_UNUSED = 0.25
"""Share of the ranks that may be of adapters that no row uses, before all are laid out anew: every step multiplies them."""


class Mixture:
    """The joined tensors of the adapters in use.

    Attributes:
        tensors: What to bind, by input name.
    """

    def __init__(self, specs: Sequence[AdapterSpec]) -> None:
        self.tensors: dict[str, Array] = {}
        self._axes = {s.joined or s.name: _rank_axis(s) for s in specs if s.bound and "rank" in s.shape}
        self._places: dict[str, tuple[int, int]] = {}
        self._mask: Array = np.zeros((0, 1, 0), np.float32)
        self._rows: tuple[str, ...] = ()
        self._ranks = 0

    def hold(self, adapters: Mapping[str, Mapping[str, Array]]) -> bool:
        """Make room for the placed tensors of these adapters; return whether ``tensors`` are other arrays now."""
        missing = [name for name in adapters if name not in self._places]
        unused = self._ranks - sum(self._places[n][1] for n in adapters if n in self._places)
        for name in missing:
            rank = adapters[name][ADAPTER_MASK].shape[-1]
            start = self._free_place(rank, adapters)
            if start is None:
                return self._lay_out(adapters)
            self._places = {n: p for n, p in self._places.items() if n in adapters or not _overlap(p, (start, rank))}
            self._put(name, adapters[name], start, rank)
            unused -= rank
        return self._lay_out(adapters) if unused > _MOST_UNUSED * self._ranks else False

    def forget(self, name: str) -> None:
        """Let the place of an adapter be used by others."""
        self._places.pop(name, None)
        self._rows = ()

    def mask(self, adapters: Sequence[str]) -> tuple[str, Array]:
        """Return the name of the mask's input, and the mask ``(B, 1, R)`` for rows with these adapters."""
        if self._rows != tuple(adapters):
            self._mask = np.zeros((len(adapters), 1, self._ranks), np.float32)
            for row, name in enumerate(adapters):
                if name != BASE:
                    start, rank = self._places[name]
                    self._mask[row, 0, start : start + rank] = 1
            self._rows = tuple(adapters)
        return ADAPTER_MASK, self._mask

    def _free_place(self, rank: int, needed: Mapping[str, Any]) -> int | None:
        taken = sorted(place for name, place in self._places.items() if name in needed)
        start = 0
        for begin, length in taken:
            if begin - start >= rank:
                return start
            start = begin + length
        return start if self._ranks - start >= rank else None

    def _lay_out(self, adapters: Mapping[str, Mapping[str, Array]]) -> bool:
        ranks = {name: placed[ADAPTER_MASK].shape[-1] for name, placed in adapters.items()}
        self._ranks, self._places, self._rows = sum(ranks.values()), {}, ()
        first = next(iter(adapters.values()))
        for name, axis in self._axes.items():
            shape = list(first[name].shape)
            shape[axis] = shape[axis] // next(iter(ranks.values())) * self._ranks
            self.tensors[name] = np.zeros(shape, first[name].dtype)
        start = 0
        for name, placed in adapters.items():
            self._put(name, placed, start, ranks[name])
            start += ranks[name]
        return True

    def _put(self, name: str, placed: Mapping[str, Array], start: int, rank: int) -> None:
        """Write an adapter's ranks; a joined tensor has several parts, each with the ranks of all adapters."""
        for key, axis in self._axes.items():
            whole, mine = self.tensors[key], placed[key]
            for part in range(mine.shape[axis] // rank):
                to = part * self._ranks + start
                whole[_along(axis, to, rank)] = mine[_along(axis, part * rank, rank)]
        self._places[name] = (start, rank)
        self._rows = ()


def _rank_axis(spec: AdapterSpec) -> int:
    """Return the axis of the rank in the placed tensor, counted from the end (matrices only)."""
    if spec.joined:
        return -2 if spec.columns else -1
    axis = spec.shape.index("rank")
    return (spec.perm.index(axis) if spec.perm else axis) - len(spec.shape)


def _along(axis: int, start: int, length: int) -> tuple[Any, ...]:
    return (..., slice(start, start + length), *(slice(None),) * (-axis - 1))


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < sum(other) and other[0] < sum(one)
