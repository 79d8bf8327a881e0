# SPDX-License-Identifier: BSD-3-Clause
"""The test over a Ray cluster on this machine."""

import dataclasses
import sys
from pathlib import Path

import pytest

from QEfficient.errors import ConfigError
from QEfficient.testing.cluster import Cluster, run_on_ray
from QEfficient.testing.report import Outcome
from tests.testing.conftest import Folders

ONLY = ["adapter.*", "pytorch.effect", "pytorch.finite"]


def test_absent_ray_is_named(folders: Folders, monkeypatch: pytest.MonkeyPatch):
    """Without Ray the error says what to install."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'efficient-transformers\[ray\]'"):
        run_on_ray(folders.base, {"one": folders.one})


@pytest.mark.slow
def test_lost_adapter_takes_no_other_along(folders: Folders, tmp_path: Path):
    """Two groups on one cluster: the report holds every adapter in order, the one that cannot be read as a failure."""
    ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    given = {"one": folders.one, "gone": tmp_path / "gone", "two": folders.two, "twin": folders.one}
    try:
        report = run_on_ray(
            folders.base, given, cluster=Cluster(cpus=1, tasks=4), only=ONLY, measure_speed=False, report_dir=tmp_path
        )
    finally:
        ray.shutdown()
    assert [a.name for a in report.adapters] == list(given)
    assert [report.verdict_of(n) for n in ("one", "gone", "two")] == [Outcome.WARN, Outcome.FAIL, Outcome.PASS]
    assert {r.subject for r in report.results if r.name == "adapter.duplicate" and r.outcome is Outcome.WARN} == {
        "one",
        "twin",
    }
    assert (tmp_path / "report.html").is_file()
    assert dataclasses.asdict(report.base)["name"] == "base"


@pytest.mark.slow
def test_hanging_task_is_given_up(folders: Folders):
    """A task that gives no answer in time is reported, and tried once more alone."""
    ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        with pytest.raises(Exception, match="no answer within"):
            run_on_ray(folders.base, {"one": folders.one}, cluster=Cluster(seconds=0.2, cpus=1), only=ONLY)
    finally:
        ray.shutdown()
