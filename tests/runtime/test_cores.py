# SPDX-License-Identifier: BSD-3-Clause
import os
import subprocess
import sys

import psutil
import pytest

from QEfficient.runtime.cores import usable_cores

PHYSICAL = psutil.cpu_count(logical=False) or os.cpu_count()


def _place(tmp_path, own, files):
    groups = tmp_path / "groups"
    for name, text in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(text)
    (tmp_path / "own").write_text(own)
    return usable_cores(groups, tmp_path / "own")


@pytest.mark.parametrize(
    ("own", "files"),
    [
        ("0::/\n", {"cpu.max": "100000 100000\n"}),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "150000 100000\n"}),
        ("0::/host/name/of/it\n", {"cpu.max": "50000 100000\n"}),
        ("4:cpu,cpuacct:/job\n", {"cpu,cpuacct/job/cpu.cfs_quota_us": "199999\n", "cpu,cpuacct/job/cpu.cfs_period_us": "100000\n"}),
    ],
    ids=["container", "group above", "container under another name", "version 1"],
)  # fmt: skip
def test_quota_of_a_control_group(tmp_path, own, files):
    """A group that allows less than two cores leaves one, wherever it stands above the process."""
    assert _place(tmp_path, own, files) == 1


@pytest.mark.parametrize(
    ("own", "files"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}),
        ("0::/\n", {}),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}),
        ("3:memory:/\n", {"memory/cpu.max": "100000 100000\n"}),
        ("0::/\n", {"cpu.max": "6400000 100000\n"}),
    ],
    ids=["no limit", "nothing said", "version 1 without limit", "of memory", "more than there are"],
)
def test_without_a_limit(tmp_path, own, files):
    """What sets no limit leaves what the machine has."""
    assert _place(tmp_path, own, files) == min(PHYSICAL, len(os.sched_getaffinity(0)))


def test_a_system_without_groups(tmp_path):
    """Where no file says which groups there are, the machine's cores count."""
    assert usable_cores(tmp_path, tmp_path / "none") == min(PHYSICAL, len(os.sched_getaffinity(0)))


def test_affinity():
    """A process that is bound to one core uses one."""
    code = (
        "import os, psutil; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from QEfficient.runtime.cores import usable_cores; print(usable_cores())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
