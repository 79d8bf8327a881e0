# SPDX-License-Identifier: BSD-3-Clause
"""What the figures of a benchmark depend on: hardware, versions, commit, options."""

import importlib.util
import platform
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

_PEERS = {
    "onnxruntime_genai": "onnxruntime-genai",
    "llama_cpp": "llama-cpp-python",
    "trl": "trl",
}


def machine(options: Any) -> dict[str, Any]:
    """Return hardware, versions, commit and the fields of a dataclass of options, paths left out."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    names = ["torch", "transformers", "peft", "onnxruntime"]
    names += [name for module, name in _PEERS.items() if importlib.util.find_spec(module) is not None]
    chosen = {f.name: getattr(options, f.name) for f in fields(options)}
    return {
        "cpu": cpu,
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "load": [round(n, 1) for n in psutil.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "commit": done.stdout.strip(),
        "options": {name: value for name, value in chosen.items() if not isinstance(value, Path)},
    }


def read_bytes_per_second(data: np.ndarray, threads: int) -> float:
    """Return how fast ``data``, much larger than any cache, is read by some threads, each its own part: the best of four ways.

    Decoding reads distinct memory once, front to back; a way that reads at half the speed of another says nothing of the machine.
    """
    vector = np.ones(1 << 12, data.dtype)
    ways: list[Callable[[np.ndarray], Any]] = [
        np.max,
        np.sum,
        lambda part: np.bitwise_or.reduce(part.view(np.int64)),
        lambda part: part[: part.size >> 12 << 12].reshape(-1, 1 << 12) @ vector,
    ]
    return data.nbytes / min(_seconds(way, data, threads) for way in ways)


def _seconds(read: Callable[[np.ndarray], Any], data: np.ndarray, threads: int) -> float:
    workers = [threading.Thread(target=read, args=(part,)) for part in np.array_split(data, threads)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - start
