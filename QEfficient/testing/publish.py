# SPDX-License-Identifier: BSD-3-Clause
"""The report as files: each written aside, then moved, so that a reader never meets half a report."""

from pathlib import Path

from QEfficient.store import write_file
from QEfficient.testing import render_html, render_json, render_junit, render_markdown
from QEfficient.testing.report import Report

FILES = {
    "report.json": render_json.render,
    "junit.xml": render_junit.render,
    "report.md": render_markdown.render,
    "report.html": render_html.render,
}
"""What is written, and by whom."""


def publish(report: Report, folder: Path) -> None:
    """Write the report's files into ``folder``, replacing those of an earlier run."""
    for name, render in FILES.items():
        text = render(report)
        write_file(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))  # type: ignore[misc]
