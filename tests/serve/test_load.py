# SPDX-License-Identifier: BSD-3-Clause
"""The load of ``benchmarks/load.py``, shorter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_server_under_load(tmp_path: Path) -> None:
    """Clients that cancel, send nonsense and meet adapters that come, go, change and break: no wrong answer, none missing."""
    command = [sys.executable, "-m", "benchmarks.load", "--work", str(tmp_path / "load"), "--seconds", "20"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=1500)
    assert done.stdout, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert (seen["wrong"], seen["unanswered"], seen["errors"], seen["left_over"]) == (
        [],
        0,
        [],
        {"slots": 0, "leases": 0},
    )
    assert (
        min(
            seen[kind]
            for kind in ("complete", "cancelled", "malformed, refused", "replaced", "corrupted adapter (422)")
        )
        > 0
    )
    assert done.returncode == 0
