# SPDX-License-Identifier: BSD-3-Clause
"""From examples to batches: in which order, side by side in a row or padded. Knows tokens, no text and no files."""

import bisect
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.utils.data import Sampler

from QEfficient.finetune.data import IGNORED, Example

_POOL = 50
"""Batches among which examples are sorted by length: enough to save padding, few enough to stay mixed."""

Row: TypeAlias = list[Example]
"""Examples that share a row of a batch; one, unless they are packed."""

FILLER = Example([0], [IGNORED])
"""An example from which nothing is learned."""


class Rows(Sequence[Row]):
    """Rows of examples, filled up with rows from which nothing is learned to a whole number of optimizer steps.

    So every process gets the same number of batches, and the last step of an epoch has the same loss for any number
    of them.

    Attributes:
        real: How many rows hold examples.
    """

    def __init__(self, examples: Sequence[Example], per_step: int, *, context_length: int = 0) -> None:
        """Pack ``examples`` into rows of ``context_length`` tokens, or give each a row of its own if that is 0."""
        self._examples = examples
        self._packed = pack([len(e.input_ids) for e in examples], context_length) if context_length else None
        self.real = len(examples) if self._packed is None else len(self._packed)
        self._count = -(-self.real // per_step) * per_step

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if index >= self.real:
            return [FILLER]
        return [self._examples[i] for i in (self._packed[index] if self._packed is not None else (index,))]


class EpochOrder(Sampler[int]):
    """An order that only seed and epoch decide, so that a resumed training sees what it would have seen.

    Attributes:
        epoch: Which passage it is; set before each.
    """

    def __init__(self, rows: Rows, per_step: int, seed: int, *, by_length: bool = False) -> None:
        self.epoch = 0
        self._rows, self._per_step, self._seed, self._by_length = rows, per_step, seed, by_length

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self._seed} {self.epoch}")
        order = list(range(self._rows.real))
        draw.shuffle(order)
        if self._by_length:
            order = self._sorted(order, draw)
        return iter([*order, *range(self._rows.real, len(self._rows))])

    def _sorted(self, order: list[int], draw: random.Random) -> list[int]:
        pool, size = self._per_step * _POOL, self._per_step
        pools = [order[i : i + pool] for i in range(0, len(order), pool)]
        order = [i for part in pools for i in sorted(part, key=lambda i: -len(self._rows[i][0].input_ids))]
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        last = batches.pop() if batches and len(batches[-1]) < size else []
        draw.shuffle(batches)
        return [i for batch in [*batches, last] for i in batch]


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return which items share a row so that no row exceeds ``capacity``: each goes where it fits best, longest first."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect.bisect_left(free, (lengths[item], 0))
        if place < len(free):
            left, row = free.pop(place)
        else:
            left, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        bisect.insort(free, (left - lengths[item], row))
    return rows


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads rows on the right to the longest; padding is masked by position, whatever token it is.

    Attributes:
        pad_token_id: What fills ``input_ids``.
        packed: Whether rows may hold several examples; their positions then start anew, by which
            transformers keeps them from seeing each other.
        tasks: How many tasks the adapter holds one by one; 0 for most methods, which are told of none.
    """

    pad_token_id: int
    packed: bool = False
    tasks: int = 0

    def __call__(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        """Return ``input_ids``, ``attention_mask``, ``labels`` and, if packed, ``position_ids``: each ``(B, S)`` int64; ``task_ids`` ``(B,)``."""
        names = ("input_ids", "attention_mask", "labels", "position_ids")
        columns: dict[str, list[list[int]]] = {name: [] for name in names}
        length = max(sum(len(e.input_ids) for e in row) for row in rows)
        for row in rows:
            ids = [token for e in row for token in e.input_ids]
            rest = length - len(ids)
            # The first token of an example is predicted from nothing: not from the example beside it.
            labels = [x for e in row for x in ([IGNORED, *e.labels[1:]] if self.packed else e.labels)]
            columns["input_ids"].append(ids + [self.pad_token_id] * rest)
            columns["attention_mask"].append([1] * len(ids) + [0] * rest)
            columns["labels"].append(labels + [IGNORED] * rest)
            positions = [p for e in row for p in range(len(e.input_ids))]
            columns["position_ids"].append(positions + list(range(rest)))
        if not self.packed:
            del columns["position_ids"]
        batch = {name: torch.tensor(values) for name, values in columns.items()}
        return batch | ({"task_ids": torch.tensor([row[0].task for row in rows])} if self.tasks else {})


@dataclass(frozen=True, slots=True)
class ClassCollator:
    """Pads examples of classes on the right; their labels are one number each.

    Attributes:
        pad_token_id: What fills ``input_ids``.
    """

    pad_token_id: int

    def __call__(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        """Return ``input_ids`` and ``attention_mask``, ``(B, S)``, and ``labels``, ``(B,)``: each int64."""
        examples = [example for row in rows for example in row]
        batch = Collator(self.pad_token_id)([[Example(e.input_ids, e.input_ids)] for e in examples])
        return {**batch, "labels": torch.tensor([e.labels[0] for e in examples])}
