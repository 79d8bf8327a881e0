# SPDX-License-Identifier: BSD-3-Clause
"""Faults that several tests plant."""

import json
import shutil
from pathlib import Path

import numpy as np


def copied(graph: Path, folder: Path) -> Path:
    """Return a copy of a graph folder, without its programs, that a test may damage."""
    return Path(shutil.copytree(graph, folder / "graph", ignore=shutil.ignore_patterns("qpc-*")))


def scale_weight(graph: Path, ending: str, *, elements: slice = slice(None)) -> Path:
    """Make a weight of the graph 5 % larger (0.05, if it is all zero) where it lies in its file; return the file."""
    path = next(graph.glob("weights*.safetensors"))
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    begin, end = next(v["data_offsets"] for k, v in header.items() if k.endswith(ending))
    values = np.frombuffer(content, np.float32, (end - begin) // 4, start + begin)
    values[elements] = values[elements] * np.float32(1.05) + (0 if values[elements].any() else np.float32(0.05))
    path.write_bytes(content)
    return path
