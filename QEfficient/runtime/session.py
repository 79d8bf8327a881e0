# SPDX-License-Identifier: BSD-3-Clause
"""One loaded graph or program, its cache, and its resident adapters.

Knows NumPy and ONNX Runtime; knows neither PyTorch nor text. Cache and adapters stay where they are: past and present
are bound to the same memory, an adapter is bound when it is first selected (to a binding of its own, so that switching costs
the same whatever their number and size), and a call binds only tokens, positions and logits.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime
import psutil

from QEfficient.contract import (
    ADAPTER_MASK,
    BASE,
    INPUT_IDS,
    KERNELS,
    LOGITS,
    MIXED,
    MODEL_FILE,
    NEUTRAL_FILE,
    ONE_ROW_CHUNKS,
    ONE_TOKEN,
    POSITION_IDS,
    RETAINED,
    Manifest,
    StateSpec,
)
from QEfficient.errors import (
    AdapterMismatchError,
    AdapterNotFoundError,
    ArtifactError,
    ConfigError,
    NotCompiledError,
    UnsupportedError,
)
from QEfficient.kernels.library import library, sources
from QEfficient.options import suggest
from QEfficient.runtime import aligned
from QEfficient.runtime.adapters import neutral_tensors, place, rank_of, split_entries, validate
from QEfficient.runtime.cores import usable_cores
from QEfficient.runtime.pages import on_large_pages
from QEfficient.store import verify_files

Array = npt.NDArray[Any]

_DISABLE_FLASH = "ORT_GQA_DISABLE_FLASH_ATTENTION"
"""ONNX Runtime's tiled attention takes a token at 4096 positions 1.1 times as long as its plain one (docs/performance.md); it
is chosen by this variable of the environment only, read when a session is made. A caller's own setting stays."""


class Session(Protocol):
    """What generation and measuring need of a runtime; an accelerator's runtime is one more class with these members."""

    manifest: Manifest

    @property
    def batch_size(self) -> int:
        """Rows of the cache; 0 before :meth:`allocate`."""

    @property
    def ctx_len(self) -> int:
        """Positions of a row of the cache; 0 before :meth:`allocate`."""

    @property
    def active_adapter(self) -> str:
        """Name of the adapter that the next call runs with, or ``"base"``."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the resident adapters, without ``"base"``."""

    @property
    def virtual_tokens(self) -> int:
        """Cache entries that the active adapter takes in front of every row's own."""

    def allocate(self, batch_size: int, ctx_len: int) -> None:
        """Make the cache for ``batch_size`` rows of ``ctx_len`` positions, all zero."""

    def reset(self) -> None:
        """Empty the cache."""

    def run(self, input_ids: Array, position_ids: Array) -> Array:
        """Advance every row by up to ``S`` tokens and return the logits."""

    def reorder(self, rows: Sequence[int] | Array) -> None:
        """Let row ``b`` of the cache become what row ``rows[b]`` was."""

    def load_adapter(self, name: str, tensors: Mapping[str, Array]) -> None:
        """Make an adapter resident."""

    def set_adapter(self, name: str) -> None:
        """Run with a resident adapter, or with ``"base"``, from the next call on."""

    def unload_adapter(self, name: str) -> None:
        """Forget a resident adapter."""

    def memory_bytes(self) -> dict[str, int]:
        """Return what ``weights``, ``cache`` and ``adapters`` take."""


class OrtSession:
    """A graph or program folder loaded in ONNX Runtime on the CPU.

    Safe to call from several threads: calls wait for each other. The cache and the active adapter belong to the session,
    though, so two generations at the same time need two sessions.

    Args:
        folder: A graph folder or a program folder.
        threads: Threads of one call; ``None``: one for each physical core that the process may use.
        verify: Check the folder's files against its manifest first (sizes and times; bytes only where those changed).
        large_pages: Put the weights on large pages of memory where the system has them: for sessions that live long, because
            loading takes longer (up to 3 s for a gigabyte was seen) and every token a little less.

    Raises:
        ArtifactError: The folder is not whole, or ONNX Runtime cannot load it.
    """

    def __init__(
        self, folder: Path, *, threads: int | None = None, verify: bool = True, large_pages: bool = False
    ) -> None:
        folder = Path(folder)
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self.manifest.require_weights(folder)
        if verify:
            verify_files(folder, self.manifest.files)
        options = onnxruntime.SessionOptions()
        cores = usable_cores()
        if threads is not None or cores < (psutil.cpu_count(logical=False) or 1):
            options.intra_op_num_threads = threads or cores
        if KERNELS in self.manifest.options:
            options.register_custom_ops_library(str(self._kernels()))
        os.environ.setdefault(_DISABLE_FLASH, "1")
        try:
            with on_large_pages() if large_pages else nullcontext():
                # Our kernels read weights where their file is mapped, and files have small pages.
                self._weights = self._read_weights() if large_pages and KERNELS in self.manifest.options else {}
                options.add_external_initializers_from_files_in_memory(
                    [*self._weights], [*self._weights.values()], [w.nbytes for w in self._weights.values()]
                )
                self._ort = onnxruntime.InferenceSession(
                    folder / MODEL_FILE,
                    options,
                    providers=["CPUExecutionProvider"],
                    # Folding the transposes of a graph's weights takes longer than all else that loading does; programs have none.
                    disabled_optimizers=None if self.manifest.is_program else ["ConstantFolding"],
                )
        except Exception as e:  # ONNX Runtime's exceptions share no base class
            raise ArtifactError(f"ONNX Runtime cannot load {folder / MODEL_FILE}: {e}") from e
        self._lock = threading.RLock()
        self._one_row_chunks = bool(self.manifest.options.get(ONE_ROW_CHUNKS, False))
        self._one_token = bool(self.manifest.options.get(ONE_TOKEN, False))
        self._last: dict[int, tuple[int, Array]] = {}  # row -> position and logits of its last token, if one_token
        self._states: dict[str, Array] = {}
        self._batch_size = self._ctx_len = self._room = self._filled = 0
        base = neutral_tensors(self.manifest.adapter, folder / NEUTRAL_FILE) | self._mask(1)
        self._adapters: dict[str, dict[str, Array]] = {BASE: base}
        self._entries: dict[str, dict[str, Array]] = {}  # what an adapter puts first into every row of the cache
        self._shift = np.zeros(0, np.int64)  # how many entries each row began with; its tokens stand behind them
        self._active = BASE
        self._bindings: dict[str, Any] = {}  # of the cache and an adapter, made when first used

    def _read_weights(self) -> dict[str, Array]:
        """Return the bytes of the files that hold weights, by name."""
        names = [name for name in self.manifest.files if name.endswith(".safetensors") and name != NEUTRAL_FILE]
        return {name: np.fromfile(self.folder / name, np.uint8) for name in names}

    def _kernels(self) -> Path:
        """Return the library of the operators that the program uses, compiled for this machine.

        Raises:
            ArtifactError: They are not those of this version, or this machine cannot have them.
        """
        if self.manifest.options[KERNELS] != sources():
            raise ArtifactError(
                f"{self.folder} was compiled for kernels of another version of this package; compile its graph again"
            )
        try:
            return library()
        except UnsupportedError as e:
            raise ArtifactError(
                f"{self.folder} uses kernels that this machine cannot have: {e}. Compile its graph again on this machine."
            ) from e

    @property
    def batch_size(self) -> int:
        """Rows of the cache; 0 before :meth:`allocate`."""
        return self._batch_size

    @property
    def ctx_len(self) -> int:
        """Positions of a row of the cache; 0 before :meth:`allocate`."""
        return self._ctx_len

    @property
    def active_adapter(self) -> str:
        """Name of the adapter that the next call runs with, or ``"base"``."""
        return self._active

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the resident adapters, without ``"base"``."""
        return tuple(n for n in self._adapters if n != BASE)

    @property
    def virtual_tokens(self) -> int:
        """Cache entries that the active adapter takes in front of every row's own."""
        return _count(self._entries.get(self._active, {}))

    def allocate(self, batch_size: int, ctx_len: int) -> None:
        """Make the cache for ``batch_size`` rows of ``ctx_len`` positions, all zero.

        Raises:
            ConfigError: A size is not positive, longer than the base's or the program's longest context, or the cache
                is larger than the memory that is available.
        """
        if batch_size < 1 or ctx_len < 1:
            raise ConfigError(f"batch_size and ctx_len must be at least 1, not {batch_size} and {ctx_len}")
        if ctx_len > (longest := longest_context(self.manifest)):
            raise ConfigError(f"ctx_len is {ctx_len}, but the longest context of {self.folder} is {longest}")
        # Adapters with virtual tokens find room for them in front; positions that callers give do not count them.
        room = ctx_len + max((_count(entries) for entries in self._entries.values()), default=0)
        shapes = {s.name: _fill_in(s, batch_size, min(room, longest)) for s in self.manifest.states}
        need = sum(int(np.prod(shapes[s.name])) * np.dtype(s.dtype).itemsize for s in self.manifest.states)
        with self._lock:
            # What the present cache holds is given back first, so it counts as available.
            available = psutil.virtual_memory().available + self.memory_bytes()["cache"]
            if need > available:
                raise ConfigError(
                    f"a cache of batch_size {batch_size} by ctx_len {ctx_len} takes {need / 2**20:.0f} MiB, "
                    f"{available / 2**20:.0f} MiB of memory are available. Use a smaller batch_size or ctx_len."
                )
            self._bindings = {}
            self._states = {}
            self._states = {s.name: aligned.zeros(shapes[s.name], s.dtype) for s in self.manifest.states}
            self._batch_size, self._ctx_len, self._filled = batch_size, ctx_len, 0
            self._room = min(room, longest)
            self._shift = np.zeros(batch_size, np.int64)
            self._last = {}

    def reset(self) -> None:
        """Empty the cache: what was filled becomes zero."""
        with self._lock:
            for spec in self.manifest.states:
                if spec.name in self._states:
                    self._states[spec.name][:, *filled_part(spec, self._filled)] = 0
            self._filled = 0
            self._last = {}

    def run(self, input_ids: Array, position_ids: Array) -> Array:
        """Advance every row by up to ``S`` tokens.

        Args:
            input_ids: ``(B, S)``; what stands at padding must be a valid token id, which one does not matter.
            position_ids: ``(B, S)``; consecutive positions, then -1 for padding. See the rules of the graph's contract.

        Returns:
            A new array, ``(B, 1, V)`` or ``(B, S, V)``, as the manifest's ``logits`` says.

        Raises:
            NotCompiledError: :meth:`allocate` has not been called.
            ConfigError: Shapes, token ids or positions break the contract or do not fit the cache.
        """
        ids = np.ascontiguousarray(input_ids, dtype=np.int64)
        positions = np.ascontiguousarray(position_ids, dtype=np.int64)
        with self._lock:
            self._check(ids, positions)
            positions = self._behind_entries(positions)
            self._filled = max(self._filled, int(positions[:, 0].max()) + ids.shape[1])
            if self._one_token:
                return self._run_tokens(ids, positions)
            if self._one_row_chunks and ids.shape[0] > 1 and ids.shape[1] > 1 and positions[:, 0].any():
                return self._run_rows(ids, positions)
            if self._active not in self._bindings:
                self._bindings[self._active] = self._bind_all()
            return self._call(self._bindings[self._active], ids, positions)

    def reorder(self, rows: Sequence[int] | Array) -> None:
        """Let row ``b`` of the cache become what row ``rows[b]`` was; only rows that change are copied."""
        source = np.asarray(rows, dtype=np.int64)
        if source.shape != (self._batch_size,) or source.min() < 0 or source.max() >= self._batch_size:
            raise ConfigError(f"reorder takes one row in [0, {self._batch_size}) for each row, not {source.tolist()}")
        moved = np.flatnonzero(source != np.arange(self._batch_size))
        if moved.size == 0:
            return
        with self._lock:
            for spec in self.manifest.states:
                view = self._states[spec.name][:, *filled_part(spec, self._filled)]
                view[moved] = view[source[moved]]
            self._shift = self._shift[source]
            self._last = {row: self._last[was] for row, was in enumerate(source.tolist()) if was in self._last}

    def load_adapter(self, name: str, tensors: Mapping[str, Array]) -> None:
        """Make an adapter resident; one of the same name is replaced.

        Args:
            name: Any name but ``"base"``.
            tensors: Every adapter tensor of the manifest, scalings included, named and shaped as in the adapter's file. An
                adapter with virtual tokens brings the first entries of every state too, ``(heads, V, head_dim)`` by the
                state's name: rows that begin with it begin with them.
                Read-only arrays (memory-mapped files) are used where they are; others are copied.

        Raises:
            ConfigError: The name is ``"base"``.
            AdapterMismatchError: A tensor is missing, unknown, or of another shape or type. Nothing has changed then.
        """
        if name == BASE:
            raise ConfigError(f"{BASE!r} names the base without an adapter; give the adapter another name")
        inputs, entries = split_entries(name, tensors, self.manifest.states)
        validate(name, inputs, self.manifest.adapter)
        placed = place(inputs, self.manifest.adapter) | self._mask(rank_of(inputs, self.manifest.adapter))
        with self._lock:
            self._bindings.pop(name, None)
            self._adapters[name], self._entries[name] = placed, entries

    def placed_adapter(self, name: str) -> dict[str, Array]:
        """Return a resident adapter's tensors as they are bound, by the program's input names; not copies."""
        with self._lock:
            self._known(name)
            if self._entries.get(name):
                raise UnsupportedError(
                    f"adapter {name!r} is virtual tokens, which are no inputs of a program: it cannot be laid out or mixed with "
                    "others in one batch; use a session of its own"
                )
            return dict(self._adapters[name])

    def adopt_adapter(self, name: str, placed: Mapping[str, Array]) -> None:
        """Make an adapter resident that was laid out before: ``placed`` is what :meth:`placed_adapter` gave, used where it is.

        Raises:
            ConfigError: The name is ``"base"``.
            AdapterMismatchError: The names or types are not those of the program's inputs.
        """
        if name == BASE:
            raise ConfigError(f"{BASE!r} names the base without an adapter; give the adapter another name")
        wanted = {n: t.dtype for n, t in self._adapters[BASE].items()}
        if {n: t.dtype for n, t in placed.items()} != wanted:
            raise AdapterMismatchError(f"adapter {name!r} was laid out for another program; load it with load_adapter")
        with self._lock:
            self._bindings.pop(name, None)
            self._adapters[name], self._entries[name] = dict(placed), {}

    def read_row(self, row: int, length: int) -> dict[str, Array]:
        """Return a copy of a row's state, the first ``length`` positions of what has positions, by state name."""
        with self._lock:
            length += int(self._shift[row])
            return {s.name: self._row_part(s, row, length).copy() for s in self.manifest.states}

    def write_row(self, row: int, parts: Mapping[str, Array]) -> None:
        """Put what :meth:`read_row` returned into a row; what lies behind stays, and is overwritten before it is seen.

        Raises:
            ConfigError: It does not fit the cache.
        """
        with self._lock:
            for spec in self.manifest.states:
                part = parts[spec.name]
                length = part.shape[spec.shape.index("ctx_len") - 1] if "ctx_len" in spec.shape else 0
                if length > self._room:
                    raise ConfigError(f"the context does not fit: {length} positions, the cache holds {self._room}")
                self._row_part(spec, row, length)[...] = part
                self._filled = max(self._filled, length)
            self._shift[row] = self.virtual_tokens
            self._last.pop(row, None)

    def _row_part(self, spec: StateSpec, row: int, length: int) -> Array:
        part: Array = self._states[spec.name][row][filled_part(spec, length)]
        return part

    def set_adapter(self, name: str) -> None:
        """Run with a resident adapter, or with ``"base"``, from the next call on. The cache stays as it is.

        Raises:
            AdapterNotFoundError: No adapter of that name is resident.
        """
        with self._lock:
            self._known(name)
            self._active = name

    def unload_adapter(self, name: str) -> None:
        """Forget a resident adapter; if it is active, the base becomes active.

        Raises:
            AdapterNotFoundError: No adapter of that name is resident.
        """
        with self._lock:
            self._known(name)
            if name == BASE:
                raise ConfigError(f"{BASE!r} cannot be unloaded")
            if name == self._active:
                self._active = BASE
            self._bindings.pop(name, None)
            del self._adapters[name], self._entries[name]

    def memory_bytes(self) -> dict[str, int]:
        """Return what ``weights``, ``cache`` and ``adapters`` take, in bytes; the cache counts as if it were full."""
        weights = sum(f["bytes"] for name, f in self.manifest.files.items() if name != NEUTRAL_FILE)
        return {
            "weights": weights,
            "cache": sum(s.nbytes for s in self._states.values()),
            "adapters": sum(
                t.nbytes for held in (self._adapters, self._entries) for a in held.values() for t in a.values()
            ),
        }

    def _mask(self, rank: int) -> dict[str, Array]:
        """Return the input of a mixed program that lets every rank count for every row."""
        return {ADAPTER_MASK: np.ones((1, 1, rank), np.float32)} if self.manifest.options.get(MIXED) else {}

    def _known(self, name: str) -> None:
        if name not in self._adapters:
            known = ", ".join(sorted(self._adapters))
            raise AdapterNotFoundError(
                f"no adapter {name!r} is loaded{suggest(name, self._adapters)} (loaded: {known})"
            )

    def _behind_entries(self, positions: Array) -> Array:
        """Let rows that begin, begin with the active adapter's entries; return positions ``(B, S)`` in the cache."""
        entries, count = self._entries.get(self._active, {}), self.virtual_tokens
        begins = np.flatnonzero(positions[:, 0] == 0)
        shift = self._shift.copy()
        shift[begins] = count
        ends = positions[:, 0] + shift + positions.shape[1]
        if ends.max() > self._room:
            row = int(ends.argmax())
            raise ConfigError(
                f"the context does not fit: row {row} needs {ends[row]} positions, {shift[row]} of them for virtual tokens, "
                f"the cache holds {self._room}. Allocate after the adapter was loaded, or use a smaller context."
            )
        self._shift = shift
        if not shift.any():
            return positions
        for name, first in entries.items():
            self._states[name][begins, :, :count] = first
        return np.where(positions >= 0, positions + shift[:, None], positions)

    def _check(self, ids: Array, positions: Array) -> None:
        if not self._batch_size:
            raise NotCompiledError("the session has no cache yet: call allocate(batch_size, ctx_len) first")
        if ids.ndim != 2 or ids.shape[0] != self._batch_size or ids.shape[1] < 1 or positions.shape != ids.shape:
            raise ConfigError(
                f"input_ids and position_ids must both be ({self._batch_size}, S), not {ids.shape} and {positions.shape}"
            )
        starts = positions[:, 0]
        if starts.min() < 0:
            raise ConfigError(f"row {int(starts.argmin())} has no real token: its first position is {starts.min()}")
        if int(starts.max()) + ids.shape[1] > self._ctx_len:
            row = int(starts.argmax())
            raise ConfigError(
                f"the context does not fit: row {row} is at position {starts[row]}, {ids.shape[1]} more make "
                f"{starts[row] + ids.shape[1]}, the cache holds {self._ctx_len}"
            )
        if ids.min() < 0 or ids.max() >= self.manifest.vocab_size:
            raise ConfigError(f"token ids must be in [0, {self.manifest.vocab_size}), not {ids.min()} to {ids.max()}")

    def _call(self, binding: Any, ids: Array, positions: Array) -> Array:
        columns = 1 if self.manifest.logits == "last" else ids.shape[1]
        logits = np.empty((ids.shape[0], columns, self.manifest.vocab_size), np.float32)
        _bind_input(binding, INPUT_IDS, ids)
        _bind_input(binding, POSITION_IDS, positions)
        _bind_output(binding, LOGITS, logits)
        self._ort.run_with_iobinding(binding)
        return logits

    def _run_rows(self, ids: Array, positions: Array) -> Array:
        """Run one row at a time, on that row's part of the cache, and only as many columns as it has real tokens."""
        columns = 1 if self.manifest.logits == "last" else ids.shape[1]
        logits = np.zeros((ids.shape[0], columns, self.manifest.vocab_size), np.float32)
        for row in range(ids.shape[0]):
            real = int((positions[row] >= 0).sum())
            one = self._call(
                self._bind_all(row), ids[row : row + 1, :real].copy(), positions[row : row + 1, :real].copy()
            )
            logits[row, : one.shape[1]] = one[0]
        return logits

    def _run_tokens(self, ids: Array, positions: Array) -> Array:
        """Run one column at a time; a row that has no token in it, or repeats its last one, is left alone.

        Raises:
            ConfigError: A row does not go on behind its last token, nor begins anew: its recurrent state is not there.
        """
        every = self.manifest.logits != "last"
        logits = np.zeros((ids.shape[0], ids.shape[1] if every else 1, self.manifest.vocab_size), np.float32)
        for column in range(ids.shape[1]):
            at: list[int] = positions[:, column].tolist()
            known = [self._last[row][0] if row in self._last else -1 for row in range(len(at))]
            active = [row for row, p in enumerate(at) if p >= 0 and (p != known[row] or p == 0)]
            for row in active:
                if at[row] not in (0, known[row] + 1):
                    raise ConfigError(
                        f"row {row} is at position {known[row]} and cannot go to {at[row]}: its state is recurrent, so it "
                        "goes on behind its last token or begins anew at 0"
                    )
            groups: list[list[int]] = [active] if len(active) == len(at) else [[row] for row in active]
            for rows in groups:
                binding = self._bind_all(None if len(rows) == len(at) else rows[0])
                made = self._call(binding, ids[rows, column : column + 1], positions[rows, column : column + 1])
                for row, one in zip(rows, made, strict=True):
                    self._last[row] = (at[row], one[0])
            for row, p in enumerate(at):
                if p >= 0:
                    logits[row, column if every else 0] = self._last[row][1]
        return logits

    def _bind_all(self, row: int | None = None) -> Any:
        """Bind the state (of one row, or of all) and the active adapter to a new binding."""
        return self._bind(slice(None) if row is None else slice(row, row + 1), self._adapters[self._active])

    def _bind(self, rows: slice, tensors: Mapping[str, Array]) -> Any:
        """Bind the state of some rows, in place, and adapter tensors to a new binding."""
        binding = self._ort.io_binding()
        for name, state in self._states.items():
            _bind_input(binding, name, state[rows])
            _bind_output(binding, name + RETAINED, state[rows])
        for name, tensor in tensors.items():
            _bind_input(binding, name, tensor)
        return binding


def _count(entries: Mapping[str, Array]) -> int:
    """Return how many virtual tokens these entries ``(heads, V, head_dim)`` are."""
    return next((int(t.shape[1]) for t in entries.values()), 0)


def filled_part(spec: StateSpec, length: int) -> tuple[slice, ...]:
    """Return what indexes the first ``length`` positions of one row's state; all of a state that has no positions."""
    return (*(slice(None),) * (spec.shape.index("ctx_len") - 1), slice(0, length)) if "ctx_len" in spec.shape else ()


def longest_context(manifest: Manifest) -> int:
    """Return the largest ``ctx_len`` that the base's positions and the program's options allow."""
    limits = [manifest.max_positions, manifest.options.get("ctx_len") or 0]
    return min((n for n in limits if n), default=int(np.iinfo(np.int64).max))


def _bind_input(binding: Any, name: str, array: Array) -> None:
    binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _bind_output(binding: Any, name: str, array: Array) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _fill_in(spec: StateSpec, batch_size: int, ctx_len: int) -> tuple[int, ...]:
    sizes = {"batch_size": batch_size, "ctx_len": ctx_len}
    return tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape)
