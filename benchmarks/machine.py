# SPDX-License-Identifier: BSD-3-Clause
"""What the figures of a benchmark depend on: hardware, versions, commit, options."""

import platform
import subprocess
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil


def machine(options: Any) -> dict[str, Any]:
    """Return hardware, versions, commit and the fields of a dataclass of options, paths left out."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    chosen = {f.name: getattr(options, f.name) for f in fields(options)}
    return {
        "cpu": cpu,
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "load": [round(n, 1) for n in psutil.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "onnxruntime")},
        "commit": done.stdout.strip(),
        "options": {name: value for name, value in chosen.items() if not isinstance(value, Path)},
    }
