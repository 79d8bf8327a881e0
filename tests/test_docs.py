# SPDX-License-Identifier: BSD-3-Clause
"""The documentation says what is so."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from QEfficient.cloud.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link of a page names a file that exists."""
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_and_options_exist(page: Path) -> None:
    """A ``qefficient`` command in a console or workflow names a command, and options that its source declares."""
    for block in re.findall(r"```(?:console|yaml)\n(.*?)```", page.read_text(), re.S):
        for line in block.splitlines():
            words = line.strip().removeprefix("$ ").split()
            if words[:1] != ["qefficient"]:
                continue
            assert words[1] in COMMANDS, line
            source = (ROOT / "QEfficient" / "cloud" / f"{words[1]}.py").read_text()
            source += (ROOT / "QEfficient" / "finetune" / "config.py").read_text() if words[1] == "finetune" else ""
            for option in (w for w in words if w.startswith("--")):
                assert f"    {option[2:].replace('-', '_')}: " in source, f"{option} in: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_workflows_are_yaml(page: Path) -> None:
    """What a page shows as YAML can be pasted into a file: it is a mapping with nothing empty."""
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.S):
        content = yaml.safe_load(block)
        assert isinstance(content, dict)
        assert all(content.values())


def test_readme_commands_are_scripts() -> None:
    """The two commands of the README exist and can be run; CI runs the second."""
    for name in ("demo", "test"):
        script = ROOT / "scripts" / name
        assert f"scripts/{name}" in (ROOT / "README.md").read_text()
        assert script.stat().st_mode & 0o100
    assert "scripts/test" in (ROOT / ".ci" / "run").read_text()


def test_every_dependency_is_explained() -> None:
    """docs/dependencies.md says of each dependency why it is there."""
    names = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    page = (ROOT / "docs" / "dependencies.md").read_text()
    wanted = [re.split(r"[<>=]", name)[0] for name in names]
    assert [name for name in wanted if name not in page] == []
