# SPDX-License-Identifier: BSD-3-Clause
"""Positions that a model derives from the cache's length, made each row's own.

A model that is given no positions asks its cache for ``past = get_seq_length()`` and computes ``arange(past, past + S)``,
``arange(S) + past`` or ``table[:, past : past + S]``: one number for all rows. In a graph each row has its own. So the
cache answers with :class:`PastLength`, and :class:`RowPositions` turns what is computed with it into ``(B, S)``
positions. A use of it that is not known here is refused: positions are never wrong silently.

Other models take a call's tokens for the last ones of their keys, ``table[:, :, K - S : K, :K]``. In a graph the keys are
the whole cache, filled or not, and the call's tokens stand at their own positions.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from QEfficient.errors import UnsupportedError

_KEEP = {"add", "__add__", "__radd__", "sub", "__sub__", "to", "long", "int", "type", "type_as", "contiguous", "clone"}
_ONE_BY_ONE = {
    "float",
    "half",
    "double",
    "mul",
    "__mul__",
    "__rmul__",
    "div",
    "__truediv__",
    "__floordiv__",
    "true_divide",
}
_ONE_BY_ONE |= {"floor", "ceil", "log", "log1p", "exp", "sqrt", "clamp", "minimum", "maximum", "__rsub__", "neg"}
_SPREAD = {"unsqueeze", "expand", "repeat", "view", "reshape", "__getitem__", "embedding", "index_select"}
_INERT = {"__get__", "size", "dim", "numel", "is_floating_point", "__len__", "__hash__", "is_complex", "stride"}


class PastLength(int):
    """The length of a cache, as a number for shapes (0: the buffer is counted elsewhere), known by its type."""

    def __add__(self, other: Any) -> Any:
        return other if not isinstance(other, Tensor) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        return other if not isinstance(other, Tensor) else NotImplemented


class RowPositions(TorchFunctionMode):
    """Context in which positions counted from :class:`PastLength` are each row's own.

    Args:
        position_ids: Positions of the call's tokens, ``(B, S)``, with -1 for padding.
    """

    def __init__(self, position_ids: Tensor) -> None:
        super().__init__()
        self.starts = position_ids[:, 0].clamp(min=0)
        self.length = position_ids.shape[1]
        # One-dimensional tensors that count from each row's start, and their values for each row, ``(B, S)``.
        self._relative: dict[int, tuple[Tensor, Tensor]] = {}
        self._looked_up: dict[int, Tensor] = {}  # ``(B, S, D)`` that the model takes for ``(S, D)``
        self._rows: dict[int, Tensor] = {}  # ``(B, S)`` positions that the model takes for ``(1, S)``

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if any(isinstance(a, PastLength) for a in (*args, *kwargs.values())):
            return self._count(func, name, args, kwargs)
        if name == "__getitem__" and (axis := _past_axis(args[1])) is not None:
            return self._look_up(func, args[0], args[1], axis)
        if name == "__getitem__" and (axis := self._last_axis(args[1])) is not None:
            return self._look_up_last(func, args[0], args[1], axis)
        if (
            name == "repeat"
            and id(args[0]) in self._rows
            and len(args) == 3
            and isinstance(args[2], int)
            and args[2] == 1
        ):
            return args[0]  # repeated for each row of the batch: it has its own already
        if name in {"__getitem__", "unsqueeze"} and id(args[0]) in self._looked_up:
            return self._give_batch(func, name, args)
        if not any(id(a) in self._relative for a in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        if name in _INERT:
            return func(*args, **kwargs)
        if name in _KEEP or name in _ONE_BY_ONE:
            own = [self._relative[id(a)][1] if id(a) in self._relative else a for a in args]
            return self._mark(func(*args, **kwargs), func(*own, **kwargs))
        if name in _SPREAD:
            return self._spread(func, name, args, kwargs)
        raise UnsupportedError(f"the model computes its positions with {resolve_name(func) or name}")

    def _count(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Answer a call that has :class:`PastLength` among its arguments."""
        if name == "arange" and (kwargs.get("start") is not None or len(args) > 1):
            return self._mark(func(*args, **kwargs))
        tensor = next((a for a in args if isinstance(a, Tensor)), None)
        if name in {"add", "__add__", "__radd__"} and tensor is not None and tensor.dim() in (1, 2):
            return self._mark(tensor.clone()) if tensor.dim() == 1 else tensor + self.starts[:, None]
        if name in {"zeros", "ones", "full", "empty"}:
            return func(*args, **kwargs)
        raise UnsupportedError(f"the model computes its positions with {resolve_name(func) or name}")

    def _look_up(self, func: Any, table: Tensor, index: Any, axis: int) -> Tensor:
        """Return the rows ``past : past + S`` of a table, ``(N, ...)`` or ``(1, N)``, for each row of the batch."""
        parts = index if isinstance(index, tuple) else (index,)
        stop = parts[axis].stop
        if stop is None or (axis == 1 and table.shape[0] != 1) or axis > 1:
            raise UnsupportedError("the model cuts its positions at the cache's length")
        counted = torch.arange(stop)[None] + self.starts[:, None]
        return func(table, counted) if axis == 0 else func(func(table, 0), counted)  # type: ignore[no-any-return]

    def _last_axis(self, index: Any) -> int | None:
        """Return which axis an index cuts from ``K - S`` to ``K``, as if the call's tokens were the last of the keys."""
        parts = index if isinstance(index, tuple) else (index,)
        for axis, part in enumerate(parts):
            if isinstance(part, slice) and isinstance(part.start, torch.SymInt) and part.stop is not None:
                if _expression(part.stop - part.start) == _expression(self.length):
                    return axis
        return None

    def _look_up_last(self, func: Any, table: Tensor, index: Any, axis: int) -> Tensor:
        """Return the rows ``K - S : K`` of a table, ``(1, 1, N, ...)``, at each row's own positions."""
        if axis == 0 or any(size != 1 for size in table.shape[:axis]):
            raise UnsupportedError("the model cuts a table of several rows at the cache's length")
        counted = torch.arange(self.length)[None] + self.starts[:, None]
        rows = func(table.reshape(table.shape[axis:]), counted)  # (B, S, ...)
        rows = rows.reshape(rows.shape[0], *[1] * (axis - 1), *rows.shape[1:])
        return func(rows, (*[slice(None)] * (axis + 1), *index[axis + 1 :]))  # type: ignore[no-any-return]

    def _mark(self, tensor: Tensor, own: Tensor | None = None) -> Tensor:
        self._relative[id(tensor)] = (tensor, tensor + self.starts[:, None] if own is None else own)
        return tensor

    def _spread(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Replace counts by ``(B, S)`` positions where a model gives them a dimension for the batch, or uses them."""

        def rows(value: Any) -> Any:
            return self._relative[id(value)][1] if id(value) in self._relative else value

        if id(args[0]) in self._relative and name in {
            "unsqueeze",
            "expand",
            "repeat",
            "view",
            "reshape",
            "__getitem__",
        }:
            made, own = func(*args, **kwargs), self._relative[id(args[0])][1]
            if made.dim() == 1:
                return self._mark(made, own[:, args[1]] if name == "__getitem__" else own)
            if name in {"view", "reshape"} and tuple(made.shape) == (1, own.shape[1], *[1] * (made.dim() - 2)):
                return own.reshape(*own.shape, *[1] * (made.dim() - 2))
            behind = (name == "unsqueeze" and args[1] != 0) or (name == "__getitem__" and args[1][0] is not None)
            if made.dim() != 2 or behind:
                raise UnsupportedError(f"the model gives its positions {made.dim()} dimensions")
            if made.shape[0] == 1:
                self._rows[id(own)] = own
            return own
        if name == "__getitem__":
            return func(args[0], rows(args[1]))
        found: Tensor = func(*map(rows, args), **{k: rows(v) for k, v in kwargs.items()})
        if name == "embedding":
            self._looked_up[id(found)] = found
        return found

    def _give_batch(self, func: Any, name: str, args: Any) -> Any:
        """Put the batch, which ``(B, S, D)`` has already, where a model makes a dimension for it."""
        tensor, how = args[0], args[1]
        if name == "unsqueeze" and how == 0:
            return tensor
        new = [part for part in how if part is None] if isinstance(how, tuple) else []
        if new and how == (*new, *[slice(None)] * (len(how) - len(new))) and len(how) - len(new) <= tensor.dim() - 1:
            return tensor.reshape(tensor.shape[0], *[1] * (len(new) - 1), *tensor.shape[1:])
        return func(*args)


def _expression(size: int | torch.SymInt) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _past_axis(index: Any) -> int | None:
    """Return which axis an index cuts from :class:`PastLength` on."""
    parts = index if isinstance(index, tuple) else (index,)
    return next((i for i, p in enumerate(parts) if isinstance(p, slice) and isinstance(p.start, PastLength)), None)
