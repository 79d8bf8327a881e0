# SPDX-License-Identifier: BSD-3-Clause
"""The report as JUnit XML: one test suite for each adapter, one test case for each check."""

import re
from xml.etree import ElementTree as ET

from QEfficient.testing.report import CheckResult, Outcome, Report
from QEfficient.testing.text import judged

_NOT_XML = re.compile(r"[^\t\n\r\x20-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]")


def render(report: Report) -> str:
    """Return the report as JUnit XML."""
    root = ET.Element("testsuites", _counts(report.results, "qefficient test"))
    for subject in report.subjects:
        results = [r for r in report.results if r.subject == subject.name]
        suite = ET.SubElement(root, "testsuite", _counts(results, subject.name) | {"timestamp": report.started[:19]})
        for result in results:
            _add_case(suite, result)
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _add_case(suite: ET.Element, result: CheckResult) -> None:
    attributes = {
        "name": result.name,
        "classname": _text(f"{result.subject}.{result.stage.value}"),
        "time": f"{result.seconds:.3f}",
    }
    case = ET.SubElement(suite, "testcase", attributes)
    message = _text(result.message)
    if result.outcome is Outcome.FAIL:
        failure = ET.SubElement(case, "failure", {"message": message})
        failure.text = _text("\n".join(filter(None, [result.message, judged(result), result.reason])))
    elif result.outcome is Outcome.SKIP:
        ET.SubElement(case, "skipped", {"message": message})
    else:
        ET.SubElement(case, "system-out").text = message


def _counts(results: list[CheckResult], name: str) -> dict[str, str]:
    outcomes = [r.outcome for r in results]
    return {
        "name": _text(name),
        "tests": str(len(results)),
        "failures": str(outcomes.count(Outcome.FAIL)),
        "errors": "0",
        "skipped": str(outcomes.count(Outcome.SKIP)),
        "time": f"{sum(r.seconds for r in results):.3f}",
    }


def _text(text: str) -> str:
    """Drop the characters that XML cannot hold."""
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
