# SPDX-License-Identifier: BSD-3-Clause
"""``pytest --peft-base BASE --peft-adapter NAME=PATH``: each check becomes a test item.

Off unless the options are given, and imports nothing of weight until then. The whole test runs once, when the first item
is due, with the checks of the items that were selected (``-k``, ``--deselect``).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from QEfficient.testing.report import CheckResult, Report


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("qefficient", "PEFT adapters (Efficient Transformers)")
    group.addoption("--peft-base", metavar="BASE", help="Folder or Hub id of the base model.")
    group.addoption(
        "--peft-adapter", metavar="NAME=PATH", action="append", default=[], help="An adapter; may be repeated."
    )
    group.addoption("--peft-graph", metavar="DIR", help="Test this exported graph instead of exporting.")
    group.addoption("--peft-report", metavar="DIR", help="Write the report's files into this folder.")
    group.addoption(
        "--peft-skip", metavar="CHECK=REASON", action="append", default=[], help="Skip a check; may be repeated."
    )
    group.addoption("--peft-jobs", metavar="N", type=int, default=1, help="Processes that examine adapter folders.")


def pytest_collection(session: pytest.Session) -> None:
    """Check the options early."""
    base, adapters = (session.config.getoption(name) for name in ("--peft-base", "--peft-adapter"))
    if bool(base) != bool(adapters):
        raise pytest.UsageError("--peft-base and --peft-adapter belong together: give both")
    _adapters(session.config)
    _skips(session.config)


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """Add our items to those of the session."""
    outcome = yield
    if isinstance(collector, pytest.Session) and collector.config.getoption("--peft-base"):
        report = outcome.get_result()  # type: ignore[attr-defined]
        if report.outcome == "passed":
            report.result.append(PeftCollector.from_parent(collector, name="peft", nodeid="peft"))


class PeftCollector(pytest.Collector):
    """All checks of base and adapters."""

    def collect(self) -> Iterator["PeftItem"]:
        """Yield an item for each check of each subject."""
        from QEfficient.contract import BASE
        from QEfficient.testing.report import Stage
        from QEfficient.testing.selection import catalog

        names = [BASE, *_adapters(self.config)]
        for stage, checks in catalog().items():
            if stage in (Stage.QUALITY, Stage.BASELINE):
                continue
            for name in names:
                for check in checks:
                    if check.of_base if name == BASE else check.of_adapters:
                        yield PeftItem.from_parent(self, name=f"{stage.value}.{check.name}[{name}]")


class PeftItem(pytest.Item):
    """One check of one subject."""

    def runtest(self) -> None:
        """Look the answer up; the first item runs them all."""
        check, _, subject = self.name.removesuffix("]").partition("[")
        found = [r for r in _report(self.session).results if (r.name, r.subject) == (check, subject)]
        if not found:
            pytest.skip("not asked: what comes before it failed, or it is about several adapters")
        for outcome in ("fail", "warn", "pass", "skip"):
            for result in found:
                if result.outcome.value == outcome:
                    return self._tell(result)

    def _tell(self, result: "CheckResult") -> None:
        if result.outcome.value == "fail":
            raise CheckFailed(result)
        if result.outcome.value == "skip":
            pytest.skip(result.message)
        if result.outcome.value == "warn":
            self.add_report_section("call", "warning", result.message)
            self.warn(pytest.PytestWarning(f"{self.name}: {result.message}"))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> str:
        """Show the finding rather than our frames."""
        from QEfficient.errors import QEffError
        from QEfficient.testing.text import judged

        if isinstance(excinfo.value, QEffError):
            return f"Nothing could be tested: {excinfo.value}"
        if not isinstance(excinfo.value, CheckFailed):
            return str(excinfo.getrepr(style="short"))
        result = excinfo.value.result
        return "\n".join(filter(None, [result.message, judged(result), result.reason]))

    def reportinfo(self) -> tuple[Path, int, str]:
        """Name the item in summaries; a warning needs a line, too."""
        return Path(str(self.config.rootpath)), 0, self.name


class CheckFailed(Exception):
    """A check failed."""

    def __init__(self, result: "CheckResult") -> None:
        super().__init__(result.message)
        self.result = result


_REPORT = pytest.StashKey["Report | Exception"]()


def _adapters(config: pytest.Config) -> dict[str, str]:
    pairs = [p.partition("=") for p in config.getoption("--peft-adapter")]
    if any(not name or not path for name, _, path in pairs):
        raise pytest.UsageError("--peft-adapter takes NAME=PATH, for example sql=adapters/sql")
    return {name: path for name, _, path in pairs}


def _skips(config: pytest.Config) -> dict[str, str]:
    pairs = [p.partition("=") for p in config.getoption("--peft-skip")]
    if any(not check or not reason for check, _, reason in pairs):
        raise pytest.UsageError("--peft-skip takes CHECK=REASON, for example 'pytorch.merge=served unmerged'")
    return {check: reason for check, _, reason in pairs}


def _report(session: pytest.Session) -> "Report":
    """Run the test once, with the checks of the selected items; what cannot be tested is not tried again for the next item."""
    from QEfficient.errors import QEffError

    if _REPORT not in session.stash:
        try:
            session.stash[_REPORT] = _run(session)
        except QEffError as e:
            session.stash[_REPORT] = e
    found = session.stash[_REPORT]
    if isinstance(found, Exception):
        raise found
    return found


def _run(session: pytest.Session) -> "Report":
    from QEfficient.testing.conformance import run

    option = session.config.getoption
    return run(
        option("--peft-base"),
        _adapters(session.config),
        graph=option("--peft-graph"),
        report_dir=option("--peft-report"),
        only=sorted({i.name.partition("[")[0] for i in session.items if isinstance(i, PeftItem)}),
        skip=_skips(session.config),
        jobs=option("--peft-jobs"),
        measure_speed=False,
    )


@pytest.fixture(scope="session")
def peft_report(request: pytest.FixtureRequest) -> "Report":
    """The report of this run, for tests of a team's own: needs ``--peft-base`` and ``--peft-adapter``."""
    if not request.config.getoption("--peft-base"):
        pytest.skip("needs --peft-base and --peft-adapter")
    return _report(request.session)
