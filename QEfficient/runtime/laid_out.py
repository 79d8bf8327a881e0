# SPDX-License-Identifier: BSD-3-Clause
"""Adapters laid out for a program, in files that are mapped into memory: loading one copies and computes nothing.

A program wants adapter tensors transposed, scaled and joined. That is done when an adapter is first loaded; the result is kept
beside the program, in safetensors format, with the size, time and digest of the file that it was made of.
"""

import json
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from QEfficient.runtime.aligned import LINE
from QEfficient.runtime.session import OrtSession
from QEfficient.store import digest_file, record_file, write_file

Array = npt.NDArray[Any]

LAID_OUT_DIR = "laid_out"
_TYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def load_file(session: OrtSession, name: str, source: Path, read: Callable[[], Mapping[str, Array]]) -> bool:
    """Make the adapter in file ``source`` resident; return whether a laid-out copy was mapped.

    Args:
        session: A session.
        name: What to call the adapter.
        source: The adapter's file. As long as its size and modification time, or else its digest, are the same, so is the adapter.
        read: Returns the tensors of ``source``, as :meth:`OrtSession.load_adapter` takes them; called if there is no copy yet.

    Raises:
        QEffError: As :meth:`OrtSession.load_adapter`. A folder that cannot be written to is no error: nothing is kept then.
    """
    key = sha256(str(source.resolve()).encode()).hexdigest()[:16]
    path = session.folder / LAID_OUT_DIR / f"{key}.safetensors"
    found = _mapped(path, source)
    if found is not None:
        session.adopt_adapter(name, found)
        return True
    tensors = read()
    session.load_adapter(name, tensors)
    if any(spec.name in tensors for spec in session.manifest.states):
        return False  # virtual tokens are copied into rows, not bound
    try:
        write_file(path, lambda aside: _write(aside, session.placed_adapter(name), record_file(source)))
    except OSError:
        return False
    session.adopt_adapter(name, _mapped(path, source) or session.placed_adapter(name))
    return False


def _mapped(path: Path, source: Path) -> dict[str, Array] | None:
    """Return the arrays of a laid-out file, mapped; ``None`` if it is missing, damaged or not of ``source`` as it is now."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(begin - 8)) if begin <= size else {}
        recorded = json.loads(header.pop("__metadata__")["source"])
        stat = source.stat()
        ends = [entry["data_offsets"][1] for entry in header.values()]
        if begin + max(ends, default=0) != size or recorded["bytes"] != stat.st_size:
            return None
        if recorded["mtime_ns"] != stat.st_mtime_ns and digest_file(source) != recorded["xxh3"]:
            return None
        data = np.asarray(np.memmap(path, np.uint8, "r"))[begin:]  # views of a memmap take ten times as long to make
        return {name: _view(data, entry) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _view(data: Array, entry: Mapping[str, Any]) -> Array:
    first, last = entry["data_offsets"]
    array: Array = data[first:last].view(_TYPES[entry["dtype"]]).reshape(entry["shape"])
    return array


def _write(path: Path, tensors: Mapping[str, Array], source: Mapping[str, Any]) -> None:
    """Write safetensors with the first tensor at a multiple of a cache line, larger element types first."""
    names = {np.dtype(t): n for n, t in _TYPES.items()}
    order = sorted(tensors, key=lambda n: (-tensors[n].itemsize, n))
    header: dict[str, Any] = {"__metadata__": {"source": json.dumps(source)}}
    end = 0
    for name in order:
        t = tensors[name]
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [end, end + t.nbytes]}
        end += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % LINE)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(np.ascontiguousarray(tensors[name]).tobytes())
