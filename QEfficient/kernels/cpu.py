# SPDX-License-Identifier: BSD-3-Clause
"""What the machine's CPU can do, as one word: what is compiled for one is not used on another."""

import hashlib
import platform
from pathlib import Path


def instruction_set() -> str:
    """Return the machine's architecture and a digest of what its CPU can do."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    flags = next((line.split(":", 1)[1] for line in info.splitlines() if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {hashlib.sha256(' '.join(sorted(flags.split())).encode()).hexdigest()[:12]}"
