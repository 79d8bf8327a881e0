# SPDX-License-Identifier: BSD-3-Clause
"""Adapter tensors on their way into a session: checked against the manifest, laid out as the program wants them.

Knows names, shapes and types; does not know which PEFT method the tensors belong to.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
from safetensors.numpy import load_file

from QEfficient.contract import AdapterSpec, StateSpec
from QEfficient.errors import AdapterMismatchError, ArtifactError
from QEfficient.kernels.ranks import in_bytes
from QEfficient.options import suggest
from QEfficient.runtime import aligned

Array = npt.NDArray[Any]


def validate(name: str, tensors: Mapping[str, Array], specs: Sequence[AdapterSpec]) -> None:
    """Check that ``tensors`` are exactly what ``specs`` ask for.

    A dynamic dimension, LoRA's rank, may have any size, but the same one in all tensors.

    Raises:
        AdapterMismatchError: Naming the first difference.
    """
    known = {s.name for s in specs}
    for extra in sorted(set(tensors) - known):
        raise AdapterMismatchError(
            f"adapter {name!r} does not fit the graph: the graph has no input {extra!r}{suggest(extra, known)}"
        )
    sizes: dict[str, tuple[int, str]] = {}
    for spec in specs:
        if spec.name not in tensors:
            raise AdapterMismatchError(f"adapter {name!r} does not fit the graph: it has no tensor {spec.name!r}")
        tensor = tensors[spec.name]
        if tensor.dtype != np.dtype(spec.dtype):
            raise AdapterMismatchError(
                f"adapter {name!r} does not fit the graph: {spec.name!r} is {tensor.dtype}, the graph takes {spec.dtype}"
            )
        _check_shape(name, spec, tensor.shape, sizes)


def place(tensors: Mapping[str, Array], specs: Sequence[AdapterSpec]) -> dict[str, Array]:
    """Return what to bind: transposed, scaled and joined where the program asks for it, contiguous, ours to keep."""
    placed: dict[str, Array] = {}
    parts: dict[str, list[tuple[Array, AdapterSpec]]] = {}
    for spec in specs:
        if not spec.bound:
            continue
        tensor = tensors[spec.name]
        if spec.scaled_by:
            tensor = tensor * tensors[spec.scaled_by]
        if spec.perm:
            tensor = tensor.transpose(spec.perm)
        if spec.joined:
            parts.setdefault(spec.joined, []).append((tensor, spec))
            continue
        # A writable array may belong to a model that is being trained; what nobody can write needs no copy.
        if spec.held:
            tensor = in_bytes(tensor, rank_axis(spec))
        dtype, flags = np.dtype(spec.held or spec.dtype), tensor.flags
        fits = flags.c_contiguous and tensor.dtype == dtype and not flags.writeable
        placed[spec.name] = tensor if fits else aligned.copied(tensor, dtype)
    return placed | {name: _join(tensors) for name, tensors in parts.items()}


def _join(parts: Sequence[tuple[Array, AdapterSpec]]) -> Array:
    """Put parts ``(…, in, r)`` side by side, or parts ``(…, r, out)`` on a diagonal of the columns they name."""
    first, spec = parts[0]
    if not spec.columns:
        whole = np.concatenate([tensor for tensor, _ in parts], axis=-1)
    else:
        ranks = sum(tensor.shape[-2] for tensor, _ in parts)
        whole = np.zeros((*first.shape[:-2], ranks, spec.columns[1]), first.dtype)
        row = 0
        for tensor, of in parts:
            start = of.columns[0]
            whole[..., row : row + tensor.shape[-2], start : start + tensor.shape[-1]] = tensor
            row += tensor.shape[-2]
    whole = in_bytes(whole, rank_axis(spec)) if spec.held else whole
    return aligned.copied(whole, whole.dtype)


def rank_axis(spec: AdapterSpec) -> int:
    """Return the axis of the rank in the placed tensor, counted from the end."""
    if spec.joined:
        return -2 if spec.columns else -1
    axis = spec.shape.index("rank")
    return (spec.perm.index(axis) if spec.perm else axis) - len(spec.shape)


def rank_of(tensors: Mapping[str, Array], specs: Sequence[AdapterSpec]) -> int:
    """Return the size of the dynamic dimension; 1 if no tensor has one."""
    return next((tensors[s.name].shape[s.shape.index("rank")] for s in specs if "rank" in s.shape), 1)


def split_entries(
    name: str, tensors: Mapping[str, Array], states: Sequence[StateSpec]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Tell an adapter's tensors from what it puts first into every row of the cache, ``(heads, V, head_dim)`` by state.

    Raises:
        AdapterMismatchError: An entry does not fit its state, or states are missing.
    """
    known = {s.name: s for s in states}
    entries = {n: np.array(t, known[n].dtype, order="C") for n, t in tensors.items() if n in known}
    counts = {t.shape[1] for t in entries.values() if t.ndim > 1}
    for spec in states if entries else ():
        given = entries[spec.name].shape if spec.name in entries else ()
        wanted = tuple(max(counts, default=0) if d == "ctx_len" else d for d in spec.shape[1:])
        if given != wanted or spec.shape.index("ctx_len") != 2:
            raise AdapterMismatchError(
                f"adapter {name!r} does not fit the graph: it begins {spec.name!r} with {given}, the graph takes {wanted}"
            )
    return {n: t for n, t in tensors.items() if n not in known}, entries


def neutral_tensors(specs: Sequence[AdapterSpec], file: Path) -> dict[str, Array]:
    """Return what to bind for the base: zeros of rank 1, but for the tensors that ``file`` holds."""
    tensors = {s.name: np.zeros([1 if isinstance(d, str) else d for d in s.shape], s.dtype) for s in specs}
    if file.is_file():
        try:
            stored = load_file(file)
        except (OSError, safetensors.SafetensorError) as e:
            raise ArtifactError(f"{file} cannot be read ({e}); export again.") from e
        tensors.update({name: t for name, t in stored.items() if name in tensors})
    return place(tensors, specs)


def _check_shape(name: str, spec: AdapterSpec, shape: tuple[int, ...], sizes: dict[str, tuple[int, str]]) -> None:
    fits = len(shape) == len(spec.shape)
    fits = fits and all(isinstance(want, str) or want == got for want, got in zip(spec.shape, shape, strict=True))
    if not fits:
        wanted = ", ".join(str(d) for d in spec.shape)
        raise AdapterMismatchError(
            f"adapter {name!r} does not fit the graph: {spec.name!r} has shape {shape}, the graph takes ({wanted})"
        )
    for want, got in zip(spec.shape, shape, strict=True):
        if not isinstance(want, str):
            continue
        size, first = sizes.setdefault(want, (got, spec.name))
        if got != size or got < 1:
            raise AdapterMismatchError(
                f"adapter {name!r} does not fit the graph: {want} is {got} in {spec.name!r} and {size} in {first!r}; "
                "it must be the same in all tensors, at least 1"
            )
