# SPDX-License-Identifier: BSD-3-Clause
"""Exports that are killed, and exports at once: a small version of ``benchmarks/kills.py``."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_killed_exports_leave_nothing_half() -> None:
    """After each ``kill -9`` every visible folder is whole; exports at once all succeed, and the graph is right."""
    argv = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "kills.py")]
    done = subprocess.run(
        [*argv, "--whole", "2", "--writing", "10", "--together", "2"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["results"]
    assert found["kills"] == 12
    assert found["folders"] == 1
