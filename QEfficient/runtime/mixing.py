# SPDX-License-Identifier: BSD-3-Clause
"""Several adapters in one call: cut into pieces of some ranks, and told which row each piece is for.

The modules of a kind (attention, or the first half of the MLP, of all layers) have pieces of those adapters only that change them. What
is multiplied follows the ranks that are in use: the last piece of an adapter is filled up with zeros, and those of adapters that left
stay until another needs their room or too much of it is theirs. Rows of one adapter share its pieces, ``"base"`` has none.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from QEfficient.contract import ADAPTER_MASK, BASE, AdapterSpec
from QEfficient.runtime import aligned
from QEfficient.runtime.adapters import rank_axis

Array = npt.NDArray[Any]
Placed = Mapping[str, Array]

PIECE = 16
"""Ranks of a piece: with fewer, kernels read the matrices more slowly; with more, zeros are read."""

_MOST_UNUSED = 0.25
"""Share of the pieces that may be of adapters that no row uses, before they are taken out: every step multiplies them."""

_MOST_ROOM = 8
"""Times the memory of the pieces there are that is kept for more."""

_OF_B = -2
"""The axis of the rank in ``B`` ``(r, out)``."""


class Mixture:
    """The pieces of the adapters in use.

    Args:
        specs: The program's adapter tensors.
        kinds: What the manifest says of a mixed program: the adapter's inputs of each kind of modules, in the order of the mask.
    """

    def __init__(self, specs: Sequence[AdapterSpec], kinds: Sequence[Sequence[str]]) -> None:
        axes = {s.joined or s.name: rank_axis(s) for s in specs if s.bound and "rank" in s.shape}
        self._kinds = [_Pieces({name: axes[name] for name in names}) for names in kinds]
        self._rows: tuple[str, ...] = ()
        self._mask: Array = np.zeros((0, 1, 0), np.float32)

    @property
    def tensors(self) -> dict[str, Array]:
        """What to bind for the adapters' tensors, by input name."""
        return {name: tensor for pieces in self._kinds for name, tensor in pieces.tensors.items()}

    def hold(self, adapters: Mapping[str, Placed]) -> bool:
        """Cut the placed tensors of these adapters, if that has not been done; return whether ``tensors`` are others now."""
        changed = [pieces.hold(adapters) for pieces in self._kinds]
        self._rows = self._rows if not any(changed) else ()
        return any(changed)

    def forget(self, name: str) -> None:
        """Let the pieces of an adapter be used by others."""
        for pieces in self._kinds:
            pieces.forget(name)
        self._rows = ()

    def mask(self, adapters: Sequence[str]) -> tuple[str, Array]:
        """Return the name of the mask's input, and the mask for rows with these adapters: ``(B, places of a piece, pieces)``."""
        if self._rows != tuple(adapters):
            self._rows = tuple(adapters)
            owners = [owner for pieces in self._kinds for owner in pieces.owners]
            most = max(self._rows.count(name) for name in {*self._rows} - {BASE})
            self._mask = np.zeros((len(adapters), most, len(owners)), np.float32)
            for row, name in enumerate(self._rows):
                if name != BASE:
                    mine = [at for at, owner in enumerate(owners) if owner == name]
                    self._mask[row, self._rows[:row].count(name), mine] = 1
        return ADAPTER_MASK, self._mask


class _Pieces:
    """The pieces of one kind of modules.

    Attributes:
        owners: The adapter that each piece is of; ``""``: of none.
    """

    def __init__(self, axes: Mapping[str, int]) -> None:
        self.owners = [""]  # a call has at least one piece
        self._axes, self._room = axes, dict[str, Array]()
        self._known: set[str] = set()  # those that have no pieces here too

    @property
    def tensors(self) -> dict[str, Array]:
        """By input, the pieces ``(C, 1, …)``."""
        return {name: room[: len(self.owners)] for name, room in self._room.items()}

    def hold(self, adapters: Mapping[str, Placed]) -> bool:
        """Cut what is new; return whether ``tensors`` are other arrays now."""
        before, room = len(self.owners), dict(self._room)
        for name in [name for name in adapters if name not in self._known]:
            self._cut(name, adapters[name], adapters)
        unused = sum(owner not in adapters for owner in self.owners)
        if unused > max(1, _MOST_UNUSED * len(self.owners)):
            self._close_up(adapters)
        return len(self.owners) != before or any(self._room[n] is not room.get(n) for n in self._room)

    def forget(self, name: str) -> None:
        """Let the pieces of an adapter be of none."""
        self._known.discard(name)
        self.owners = ["" if owner == name else owner for owner in self.owners]

    def _cut(self, name: str, placed: Placed, needed: Mapping[str, Any]) -> None:
        """Give an adapter pieces, unless it changes none of these modules."""
        rank = placed[ADAPTER_MASK].shape[-1]
        changes = any(placed[key].any() for key, axis in self._axes.items() if axis == _OF_B)
        count = -(-rank // PIECE) if changes else 0
        self.owners += [""] * (count - sum(owner not in needed for owner in self.owners))
        free = [at for at, owner in enumerate(self.owners) if owner not in needed]
        # In the order of the ranks: kernels add up pieces as they come, and a row's sum shall be that of the adapter alone.
        chosen = sorted(sorted(free, key=lambda at: self.owners[at] != "")[:count])
        for owner in {self.owners[at] for at in chosen}:
            self.forget(owner)
        self._make_room(placed, rank)
        for piece, at in enumerate(chosen):
            self.owners[at] = name
            for key, axis in self._axes.items():
                _copy_piece(placed[key], self._room[key][at, 0], axis, rank, piece * PIECE)
        self._known.add(name)

    def _make_room(self, placed: Placed, rank: int) -> None:
        """Let there be memory for all pieces."""
        for key, axis in self._axes.items() if not self._room else ():
            shape = list(placed[key].shape)
            shape[axis] = shape[axis] // rank * PIECE
            self._room[key] = aligned.zeros((0, 1, *shape), placed[key].dtype)
        if len(self.owners) > self._size:
            self._resize()

    def _resize(self) -> None:
        """Make room for twice as many pieces: the system provides memory when it is first written."""
        for key, room in self._room.items():
            self._room[key] = aligned.zeros((2 * len(self.owners), *room.shape[1:]), room.dtype)
            kept = min(len(room), len(self.owners))
            self._room[key][:kept] = room[:kept]

    def _close_up(self, needed: Mapping[str, Any]) -> None:
        """Forget unused pieces; those behind them move up."""
        kept = [at for at, owner in enumerate(self.owners) if owner in needed]
        for at, was in enumerate(kept):
            if at != was:
                for room in self._room.values():
                    room[at] = room[was]
        self.owners = [self.owners[at] for at in kept] or [""]
        self._known &= set(needed)
        if self._size > _MOST_ROOM * len(self.owners):
            self._resize()

    @property
    def _size(self) -> int:
        return len(next(iter(self._room.values()), ()))


def _copy_piece(source: Array, target: Array, axis: int, rank: int, start: int) -> None:
    """Copy the ranks from ``start`` on; a joined tensor has several parts, each with all ranks."""
    count = min(PIECE, rank - start)
    for part in range(source.shape[axis] // rank):
        target[_along(axis, part * PIECE, count)] = source[_along(axis, part * rank + start, count)]
        target[_along(axis, part * PIECE + count, PIECE - count)] = 0


def _along(axis: int, start: int, length: int) -> tuple[Any, ...]:
    return (..., slice(start, start + length), *(slice(None),) * (-axis - 1))
