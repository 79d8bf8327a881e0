# SPDX-License-Identifier: BSD-3-Clause
"""The same test over a Ray cluster: groups of adapters in tasks of their own, one report.

Every node must see base and adapters under the same paths. A group whose task fails, dies or takes too long is tried
again adapter by adapter, so that only the one to blame is left out, with the reason as a failed check.
"""

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from QEfficient.errors import ConfigError, QEffError
from QEfficient.store import digest_file
from QEfficient.testing.adapter_stage import unreadable
from QEfficient.testing.baseline import read_report
from QEfficient.testing.checks_adapter import SET_CHECKS
from QEfficient.testing.publish import publish
from QEfficient.testing.regressions import regress
from QEfficient.testing.report import Report, Stage
from QEfficient.testing.selection import Progress, Selection, perform

_CPUS = 2.0
Group = dict[str, str]


@dataclass(frozen=True, slots=True)
class Cluster:
    """How the work is spread.

    Attributes:
        seconds: How long one task may take, from when it starts.
        cpus: Processors of each task.
        tasks: How many groups the adapters make; 0 for as many as the cluster has room for.
    """

    seconds: float = 1800.0
    cpus: float = _CPUS
    tasks: int = 0


def run_on_ray(
    base: str | Path,
    adapters: Mapping[str, str | Path],
    *,
    cluster: Cluster = Cluster(),  # noqa: B008 -- frozen
    report_dir: str | Path | None = None,
    baseline: str | Path | None = None,
    progress: Progress = lambda what, subject: None,
    **options: Any,
) -> Report:
    """Test adapters of one base over a Ray cluster.

    Connects to the cluster that ``RAY_ADDRESS`` names, or starts one on this machine.

    Args:
        base: Folder or Hub id of the base.
        adapters: Names and folders of the adapters.
        cluster: How the work is spread.
        report_dir: Where to write the report; None writes nothing.
        baseline: An earlier report, or its folder; what is worse beyond noise fails.
        progress: Told what is being done.
        **options: The others of :func:`QEfficient.testing.run`.

    Raises:
        ConfigError: Ray is not installed.
        QEffError: No adapter could be tested.
    """
    ray = _ray()
    earlier = read_report(baseline) if baseline is not None else None
    began = not ray.is_initialized()
    if began:
        ray.init(log_to_driver=False, include_dashboard=False, ignore_reinit_error=True)
    try:
        room = max(1, int(ray.cluster_resources().get("CPU", 1) // cluster.cpus))
        given = {name: _absolute(path) for name, path in adapters.items()}
        reports, errors = _Work(ray, _absolute(base), options, cluster, progress).all(
            _groups(given, cluster.tasks or room)
        )
    finally:
        if began:
            ray.shutdown()
    if not reports:
        raise next(iter(errors.values()), QEffError("nothing was tested"))
    selection = Selection(tuple(options.get("only", ())), dict(options.get("skip") or {}))
    report = _merged(reports, errors, given, selection)
    if earlier is not None:
        regress(report, earlier, selection, progress)
    if report_dir is not None:
        publish(report, Path(report_dir))
    return report


def _absolute(path: str | Path) -> str:
    """Return a folder as every node sees it; a Hub id stays what it is."""
    folder = Path(path).expanduser()
    return str(folder.resolve()) if folder.exists() else str(path)


class _Work:
    """Hands out tasks and collects their reports."""

    def __init__(self, ray: Any, base: str, options: Mapping[str, Any], cluster: Cluster, progress: Progress) -> None:
        self.ray, self.base, self.options, self.cluster, self.progress = ray, base, dict(options), cluster, progress
        self.task = ray.remote(num_cpus=cluster.cpus, max_retries=0)(_examine)
        self.reports: list[Report] = []
        self.errors: dict[str, QEffError] = {}

    def all(self, groups: Sequence[Group]) -> tuple[list[Report], dict[str, QEffError]]:
        """Run groups, then what is left of those that failed, one adapter at a time."""
        alone = [{name: path} for group in self.some(groups) for name, path in group.items()]
        for group in self.some(alone) if alone else ():
            for name in group:
                self.errors.setdefault(name, QEffError(f"adapter {name!r}: its task failed"))
        return self.reports, self.errors

    def some(self, groups: Sequence[Group]) -> list[Group]:
        """Run groups; return those that gave no report."""
        waiting = {self.task.remote(self.base, group, self.options): group for group in groups}
        failed: list[Group] = []
        while waiting:
            done, _ = self.ray.wait(list(waiting), num_returns=1, timeout=self.cluster.seconds)
            for reference in done or list(waiting):
                group = waiting.pop(reference)
                self.progress("ray", ", ".join(group))
                if not self.collect(reference, group, late=not done):
                    failed.append(group)
        return failed

    def collect(self, reference: Any, group: Group, *, late: bool) -> bool:
        """Take a task's report; return whether there is one."""
        if late:
            self.ray.cancel(reference, force=True)
            error = f"no answer within {self.cluster.seconds:.0f} s: its test hangs, or the cluster has no room"
            self.errors |= {name: QEffError(f"adapter {name!r}: {error}") for name in group}
            return False
        try:
            self.reports.append(Report.from_dict(self.ray.get(reference)))
        except Exception as e:  # noqa: BLE001, RUF100 -- whatever went wrong there, the others go on
            cause = getattr(e, "cause", None) or e
            text = (str(cause).strip().splitlines() or ["no message"])[0]
            self.errors |= {name: QEffError(f"adapter {name!r}: {type(cause).__name__}: {text}") for name in group}
            return False
        for name in group:
            self.errors.pop(name, None)
        return True


def _examine(base: str, adapters: Group, options: dict[str, Any]) -> dict[str, Any]:
    """Test one group; runs in a task."""
    from QEfficient.testing.conformance import run

    return run(base, adapters, **options).to_dict()


def _groups(adapters: Group, count: int) -> list[Group]:
    size = math.ceil(len(adapters) / max(1, count))
    names = list(adapters)
    return [{n: adapters[n] for n in names[i : i + size]} for i in range(0, len(names), size)]


def _merged(reports: list[Report], errors: Mapping[str, QEffError], adapters: Group, selection: Selection) -> Report:
    """Return one report: the base as the first task saw it, and every adapter in the order given."""
    first, lost = reports[0], {n: unreadable(n, adapters[n], e) for n, e in errors.items()}
    subjects = {a.name: a for r in reports for a in r.adapters} | {n: one.subject for n, one in lost.items()}
    first.adapters = tuple(subjects[name] for name in adapters)
    for other in reports[1:]:
        first.results += [r for r in other.results if r.subject != first.base.name]
        first.measurements += [m for m in other.measurements if m.subject != first.base.name]
    sets = {f"{Stage.ADAPTER.value}.{c.name}" for c in SET_CHECKS}
    first.results = [r for r in first.results if r.name not in sets]
    first.results += [r for one in lost.values() for r in one.results]
    files = {n: Path(p) / "adapter_model.safetensors" for n, p in adapters.items() if n not in lost}
    digests = {n: digest_file(path) for n, path in files.items() if path.is_file()}
    for name in digests if len(digests) > 1 else ():
        first.results += perform(Stage.ADAPTER, SET_CHECKS, digests, name, selection)
    first.seconds = max(r.seconds for r in reports)
    return first


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as e:
        raise ConfigError(
            "--engine ray needs Ray, which is not installed: pip install 'efficient-transformers[ray]'"
        ) from e
