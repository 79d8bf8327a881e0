# SPDX-License-Identifier: BSD-3-Clause
import dataclasses
import json
import platform
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from QEfficient.testing import render_html, render_json, render_junit, render_terminal
from QEfficient.testing.publish import publish
from QEfficient.testing.report import Environment, Outcome, Report
from QEfficient.testing.text import number, ratio, size
from tests.testing.sample import sample


@pytest.mark.parametrize(("fail", "verdict"), [(True, Outcome.FAIL), (False, Outcome.PASS)])
def test_verdict_follows_from_failures_alone(fail: bool, verdict: Outcome):
    """One failure fails the report; warnings and skipped checks do not."""
    assert sample(fail=fail).verdict is verdict


def test_report_without_checks_fails():
    """A run in which nothing was asked has not shown anything."""
    report = sample()
    report.results = [r for r in report.results if r.outcome is Outcome.SKIP]
    assert report.verdict is Outcome.FAIL


def test_summary_counts():
    """The summary names how many adapters function and how many checks passed."""
    text = "1 of 2 adapters function as in PyTorch + PEFT: 2 checks passed, 1 failed, 3 warned, 3 skipped."
    assert sample().summary() == text


def test_json_returns_the_same_report():
    """What is written as JSON is read back equal."""
    report = sample()
    assert render_json.read(render_json.render(report)) == report


def test_json_without_numbers_that_are_not_finite():
    """NaN becomes null, so that any JSON reader accepts the file."""
    report = sample()
    report.results = [dataclasses.replace(r, measured=float("nan")) for r in report.results]
    content = json.loads(render_json.render(report), parse_constant=lambda c: pytest.fail(c))
    assert {r["measured"] for r in content["results"]} == {None}


def conforms(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is what a schema of the kind that we write allows."""
    if "anyOf" in schema:
        return any(conforms(value, s) for s in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    kinds = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None)}
    if schema["type"] in kinds:
        return isinstance(value, kinds[schema["type"]])
    if schema["type"] == "array":
        return isinstance(value, list) and all(conforms(v, schema["items"]) for v in value)
    named = schema.get("properties", {})
    assert set(schema.get("required", [])) <= set(value)
    return all(conforms(v, named.get(k, schema.get("additionalProperties"))) for k, v in value.items())


def test_json_follows_its_schema():
    """Every key of the JSON is in the schema, with its type."""
    schema = render_json.schema()
    content = json.loads(render_json.render(sample()))
    assert set(content) == set(schema["properties"])
    assert conforms(content, schema)


def test_junit_has_a_case_for_each_check():
    """Each check is a test case; the failure carries message, numbers and reason."""
    root = ET.fromstring(render_junit.render(sample()))
    assert (root.get("tests"), root.get("failures"), root.get("skipped")) == ("9", "1", "3")
    assert [s.get("name") for s in root] == ["base", "adapter-0", "adapter-1"]
    failure = root.find(".//failure")
    assert failure is not None
    assert failure.get("message") == "Logits differ from <PyTorch> by 0.3 of their range at decode 0."
    assert "0.3 of range (allowed 1e-4)" in (failure.text or "")


def test_terminal_fits_80_columns_and_says_why_first():
    """The verdict and the reason come before the tables, and no line is longer than the terminal."""
    lines = render_terminal.render(sample()).splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert text.startswith(" FAIL   1 of 2 adapters function")
    assert text.index("Logits differ from <PyTorch>") < text.index("checks passed  ")
    assert "2.50 \N{MULTIPLICATION SIGN}" in text


def test_html_is_one_file_that_says_what_is_wrong():
    """The page loads nothing, has the verdict, the message escaped, and each check with how to run it."""
    html = render_html.render(sample())
    assert "FAIL" in html
    assert "Logits differ from &lt;PyTorch&gt; by 0.3" in html
    assert "qefficient test models/base \\\n  --only graph.decode" in html
    assert not any(tag in html for tag in ("<script", "<link", "src=", "@import", "url(", "http://", "https://"))
    assert html.count('class="card finding fail"') == 1


def test_html_fits_a_phone():
    """Names of tensors break where the page ends, and a card that is alone in its row is no wider than the others."""
    css = render_html.render(sample()).split("<style>")[1].split("</style>")[0]
    assert "p, h3, summary, .soft { overflow-wrap: anywhere; }" in css
    assert "grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr))" in css


def test_html_links_each_cell_to_its_check():
    """Every link of the page leads to an element of the page."""
    html = render_html.render(sample(30))
    targets = set(re.findall(r'href="#([^"]+)"', html))
    assert len(targets) >= 30
    assert targets <= set(re.findall(r'id="([^"]+)"', html))


def test_closeness_is_drawn_where_it_was_measured():
    """The plot has the differences of the graph and the adapter's effect, between its limits."""
    plot = render_html.closeness(sample(), "adapter-1")
    assert plot is not None
    assert {line.style: line.y for line in plot.lines} == {"graph": (0.2, 0.3), "effect": (0.5, 0.4)} or [
        line.style for line in plot.lines
    ] == ["effect", "graph"]
    assert all(0 <= x <= 1 for line in plot.lines for x in line.x)
    assert plot.low <= -8
    assert plot.high >= 0


def test_publish_replaces_an_earlier_report(tmp_path: Path):
    """All three files are written, over those of an earlier run, and nothing else stays."""
    publish(sample(fail=True), tmp_path)
    publish(sample(fail=False), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["junit.xml", "report.html", "report.json", "report.md"]
    assert json.loads((tmp_path / "report.json").read_text())["verdict"] == "pass"


def test_environment_names_no_machine():
    """The environment says what ran, not where."""
    found = Environment.current()
    assert found.versions["torch"].startswith("2.")
    told = json.dumps(dataclasses.asdict(found))
    assert not re.search(rf"\b{re.escape(platform.node() or 'unnamed')}\b", told)  # a word: short names are in others


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0.0, "", "0"), (1.26e-6, "", "1.3e-6"), (2e-6, "", "2e-6"), (0.0412, "ms", "0.0412 ms"), (1234.6, "", "1,235"),
     (None, "", "\N{EN DASH}"), (float("nan"), "", "not finite"), (5.32e4, "bytes", "53.2 kB")],
)  # fmt: skip
def test_number(value: float | None, unit: str, text: str):
    """Numbers are written with about three digits."""
    assert number(value, unit) == text


def test_size_and_ratio():
    """Bytes in the unit that fits; a ratio above one is better for the program, whichever way the metric counts."""
    assert [size(v) for v in (999, 2e6, 3.5e9)] == ["999 B", "2 MB", "3.5 GB"]
    assert ratio(10.0, 25.0, True) == 2.5
    assert ratio(10.0, 25.0, False) == 0.4
    assert ratio(None, 25.0, True) is None


def test_report_subject_verdicts():
    """Each subject has the worst outcome of its checks."""
    report: Report = sample()
    assert [report.verdict_of(n) for n in ("base", "adapter-1", "nobody")] == [Outcome.WARN, Outcome.FAIL, Outcome.SKIP]
