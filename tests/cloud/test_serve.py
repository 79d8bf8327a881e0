# SPDX-License-Identifier: BSD-3-Clause
"""``qefficient serve``: what is wrong on the command line is said before anything starts. Serving itself: tests/serve."""

from pathlib import Path

import pytest

from QEfficient.cloud.__main__ import main


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (None, "adapter folder '{path}' does not exist"),
        ({}, "{path} is not a PEFT adapter: it has no adapter_config.json"),
        ({"adapter_config.json": '{"peft_type": "LORA",'}, "adapter_config.json is not a valid PEFT configuration"),
        ({"adapter_config.json": '{"peft_type": "NOBODY"}'}, "adapter_config.json is not a valid PEFT configuration"),
    ],
    ids=["absent", "empty", "cut", "unknown"],
)
def test_an_adapter_that_cannot_be_read(
    files: dict[str, str] | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line names the adapter and what is wrong, and the server does not start."""
    path = tmp_path / "sql"
    if files is not None:
        path.mkdir()
        for name, text in files.items():
            (path / name).write_text(text)
    assert main(["serve", str(tmp_path / "base"), "--adapter", f"sql={path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --adapter sql={path}: ")
    assert says.format(path=path) in line
    assert line.endswith("give an adapter that PEFT saved, or leave it out")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--adapter", "sql"], "--adapter takes NAME=PATH, for example sql=adapters/sql, not 'sql'"),
        (["--slots", "0"], "--slots must be at least 1, not 0"),
        (["--host", "0.0.0.0"], "without API keys the server only listens to this machine, not 0.0.0.0"),
        (["--api-keys", "nowhere.yaml"], "cannot read the API keys in nowhere.yaml"),
        (["--chat-template", "nowhere.jinja"], "cannot read nowhere.jinja"),
        (["--port", "8001"], "base folder '{base}' does not exist"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_options_that_are_wrong(argv: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are refused by name, before anything is loaded; so is a base that is not there."""
    assert main(["serve", str(tmp_path / "base"), *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert says.format(base=tmp_path / "base") in line
