# SPDX-License-Identifier: BSD-3-Clause
"""How many cores this process may use: what a container or ``taskset`` allows, where that is less than the machine has.

ONNX Runtime starts a thread for each core of the machine, whatever a process may use of it, and threads that wait for each other spin:
with a few cores of a large machine most of the time would be spent so.
"""

import os
from pathlib import Path

import psutil

_GROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def usable_cores(groups: Path = _GROUPS, own: Path = _OWN) -> int:
    """Return the number of physical cores that this process may use, at least 1.

    Args:
        groups: Where Linux shows control groups (version 2, and the processor's of version 1).
        own: Where it says which of them this process is in.
    """
    allowed = [psutil.cpu_count(logical=False) or os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):
        allowed.append(len(os.sched_getaffinity(0)))
    allowed += _quotas(groups, own)
    return max(1, min(allowed))


def _quotas(groups: Path, own: Path) -> list[int]:
    """Return the whole cores that each group above this process allows; a group without limit says nothing."""
    try:
        lines = own.read_text().splitlines()
    except OSError:  # not Linux
        return []
    found = []
    for controllers, name in (line.split(":", 2)[1:] for line in lines if line.count(":") >= 2):
        if controllers and "cpu" not in controllers.split(","):
            continue
        place = groups / (controllers or ".") / name.lstrip("/")
        # A container sees its own group as the root, under whatever name the host gave it.
        for folder in (groups / (controllers or "."), place, *place.parents):
            if folder.is_relative_to(groups):
                found += _limit(folder)
    return found


def _limit(folder: Path) -> list[int]:
    """Return the cores that one group allows, as a list of one; empty if it sets no limit."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{kind}_us").read_text().strip() for kind in ("quota", "period"))
        microseconds, of = int(quota), int(period)  # "max" is no number, and -1 no limit
    except (OSError, ValueError):
        return []
    return [max(1, microseconds // of)] if microseconds > 0 and of > 0 else []
