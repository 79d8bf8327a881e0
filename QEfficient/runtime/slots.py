# SPDX-License-Identifier: BSD-3-Clause
"""A session whose rows run with different adapters, and whose calls take some of the rows.

In a mixed program (``MIXED`` of the contract) the adapters of a call are cut into pieces that are bound together, with the rows that each
is for. In any other program a call takes rows of one adapter.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from QEfficient.contract import BASE, MIXED
from QEfficient.errors import ArtifactError
from QEfficient.runtime.mixing import Mixture
from QEfficient.runtime.session import OrtSession, _bind_input, _count, filled_part

Array = npt.NDArray[Any]

_KEPT_BINDINGS = 64


class SlotSession(OrtSession):
    """An :class:`OrtSession` that is told rows and adapters with each call.

    Other adapters than those of a call may come and go from other threads meanwhile.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        kinds = self.manifest.options.get(MIXED) or []
        if not isinstance(kinds, list):
            raise ArtifactError(f"{self.folder} was compiled by an older version of QEfficient; compile it again.")
        self.mixed = bool(kinds)
        self._mixture = Mixture(self.manifest.adapter, kinds)
        self._slot_bindings: dict[tuple[Any, ...], Any] = {}

    def run_slots(self, first: int, ids: Array, positions: Array, adapters: Sequence[str]) -> Array:
        """Advance rows ``first`` to ``first + B - 1`` and return the logits behind each row's last token, ``(B, V)``.

        Args:
            first: The first row.
            ids: ``(B, S)``; several columns only for a single row, without padding.
            positions: ``(B, S)``.
            adapters: The adapter of each row.
        """
        ids, positions = np.ascontiguousarray(ids, np.int64), np.ascontiguousarray(positions, np.int64)
        if self._one_token and ids.shape[1] > 1:
            for column in range(ids.shape[1]):
                at = slice(column, column + 1)
                logits = self.run_slots(first, ids[:, at], positions[:, at], adapters)
            return logits
        adapters = [BASE if self._adapters[a] is self._adapters[BASE] else a for a in adapters]
        if self.mixed or len(set(adapters)) == 1:
            with self._lock:
                alike = len(set(adapters)) == 1
                binding = (
                    self._binding_of(first, len(ids), adapters[0]) if alike else self._mixed_binding(first, adapters)
                )
            # Not locked: whoever loads or unloads other adapters meanwhile does not wait for a step.
            return self._call(binding, ids, positions)[:, -1]
        parts, start = [], 0
        for end in range(1, len(adapters) + 1):
            if end == len(adapters) or adapters[end] != adapters[start]:
                parts.append(self.run_slots(first + start, ids[start:end], positions[start:end], adapters[start:end]))
                start = end
        return np.concatenate(parts)

    def begin_row(self, row: int, adapter: str) -> int:
        """Put an adapter's virtual tokens first into a row; return how many those are."""
        entries = self._entries.get(adapter, {})
        for name, first in entries.items():
            self._states[name][row, :, : first.shape[1]] = first
        return _count(entries)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of a row over another row's."""
        for spec in self.manifest.states:
            self._row_part(spec, target, length)[...] = self._row_part(spec, source, length)

    def permute(self, order: Sequence[int], length: int) -> None:
        """Let row ``i`` become what row ``order[i]`` was, for the first ``len(order)`` rows and ``length`` positions."""
        for spec in self.manifest.states:
            view = self._states[spec.name][: len(order), *filled_part(spec, length)]
            view[...] = view[list(order)]

    def load_adapter(self, name: str, tensors: Mapping[str, Array]) -> None:
        """See :meth:`OrtSession.load_adapter`. Virtual tokens alone run in one call with the base's rows."""
        super().load_adapter(name, tensors)
        with self._lock:
            placed, base = self._adapters[name], self._adapters[BASE]
            if self._entries[name] and all(np.array_equal(t, base[n]) for n, t in placed.items()):
                self._adapters[name] = base

    def memory_bytes(self) -> dict[str, int]:
        """See :meth:`OrtSession.memory_bytes`; adapters may come and go meanwhile."""
        with self._lock:
            return super().memory_bytes()

    def adapter_bytes(self, name: str) -> int:
        """Return what a resident adapter takes."""
        with self._lock:
            self._known(name)
            tensors = self._adapters[name] if self._adapters[name] is not self._adapters[BASE] else {}
            return sum(t.nbytes for t in (*tensors.values(), *self._entries.get(name, {}).values()))

    def entries_of(self, name: str) -> int:
        """Return how many virtual tokens a resident adapter puts first into a row."""
        return _count(self._entries.get(name, {}))

    def unload_adapter(self, name: str) -> None:
        """See :meth:`OrtSession.unload_adapter`."""
        with self._lock:
            super().unload_adapter(name)
            self._mixture.forget(name)
            self._slot_bindings = {key: b for key, b in self._slot_bindings.items() if key[2] != name}

    def _binding_of(self, first: int, rows: int, adapter: str) -> Any:
        key = (first, rows, adapter)
        if key not in self._slot_bindings:
            self._keep(key, self._bind(slice(first, first + rows), self._adapters[adapter]))
        return self._slot_bindings[key]

    def _mixed_binding(self, first: int, adapters: Sequence[str]) -> Any:
        if self._mixture.hold({n: self._adapters[n] for n in adapters if n != BASE}):
            self._slot_bindings = {key: b for key, b in self._slot_bindings.items() if key[2] is not None}
        key = (first, len(adapters), None)
        if key not in self._slot_bindings:
            self._keep(key, self._bind(slice(first, first + len(adapters)), self._mixture.tensors))
        binding = self._slot_bindings[key]
        name, mask = self._mixture.mask(adapters)
        _bind_input(binding, name, mask)
        return binding

    def _keep(self, key: tuple[Any, ...], binding: Any) -> None:
        while len(self._slot_bindings) >= _KEPT_BINDINGS:
            del self._slot_bindings[next(iter(self._slot_bindings))]
        self._slot_bindings[key] = binding
