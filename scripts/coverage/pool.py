# SPDX-License-Identifier: BSD-3-Clause
"""Cases in processes of their own: several at once, each with a time limit.

Processes are forked from one that has imported everything, so that a case starts in milliseconds.
"""

import json
import multiprocessing
import os
import resource
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

MEMORY_BYTES = 12 << 30
_PATIENCE = 10  # times the limit of processor time that a case may take by the clock


def run_all(
    cases: Iterable[tuple[str, Callable[[], dict[str, Any]]]], jobs: int, timeout_s: float, scratch: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run cases, ``jobs`` at once; yield each one's name and outcome as it ends.

    Args:
        cases: What to run, by name.
        jobs: How many at once.
        timeout_s: Limit of a case's processor time: what else the machine does is no fault of the case.
        scratch: Folder for their results.
    """
    context = multiprocessing.get_context("fork")
    waiting = list(cases)[::-1]
    running: dict[Any, tuple[str, Path, float]] = {}
    scratch.mkdir(parents=True, exist_ok=True)
    while waiting or running:
        while waiting and len(running) < jobs:
            name, work = waiting.pop()
            path = scratch / f"{name.replace('/', '_')}.json"
            path.unlink(missing_ok=True)
            process = context.Process(target=_run, args=(work, path))
            process.start()
            running[process] = (name, path, time.monotonic())
        time.sleep(0.05)
        for process, (name, path, began) in list(running.items()):
            took = time.monotonic() - began
            late = process.is_alive() and (_used_s(process.pid) > timeout_s or took > _PATIENCE * timeout_s)
            if process.is_alive() and not late:
                continue
            process.kill()
            process.join()
            del running[process]
            yield name, {**_outcome(path, process.exitcode, late), "seconds": round(took, 1)}


def _used_s(pid: int | None) -> float:
    """Return the processor time of a process; 0 where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _run(work: Callable[[], dict[str, Any]], path: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    torch.set_num_threads(1)
    try:
        outcome = work()
    except Exception as e:
        where = traceback.extract_tb(e.__traceback__)[-1]
        lines = str(e).strip().splitlines() or [""]
        place = f"{Path(where.filename).name}:{where.lineno}"
        outcome = {"outcome": "error", "reason": f"{type(e).__name__}: {lines[0][:250]} ({place})"}
    path.write_text(json.dumps(outcome))


def _outcome(path: Path, code: int | None, late: bool) -> dict[str, Any]:
    if path.is_file() and (text := path.read_text()):
        path.unlink()
        return dict(json.loads(text))
    return {"outcome": "error", "reason": "took too long" if late else f"the process ended with {code}"}
