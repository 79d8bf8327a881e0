# SPDX-License-Identifier: BSD-3-Clause
"""``qefficient serve``: what is wrong on the command line is said before anything starts. Serving itself: tests/serve."""

import socket
from contextlib import nullcontext
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from QEfficient.cloud.__main__ import main
from QEfficient.errors import ConfigError
from QEfficient.serve import start
from tests.serve.conftest import save_tokenizer


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
        (["--grace-seconds", "-1"], "--grace-seconds must be at least 0, not -1"),
        (["--receive-seconds", "0"], "--receive-seconds must be at least 1, not 0"),
        (["--prefix-memory-mb", "-1"], "--prefix-memory-mb must be at least 0, not -1"),
        (["--threads", "-2"], "--threads must be at least 0, not -2"),
        (["--allow-folder", "nowhere"], "--allow-folder nowhere is no folder"),
        (["--adapter", "a/b=x"], "adapter name 'a/b' may hold letters, digits"),
        (["--port", "-1"], "--port must be at least 0, not -1"),
        (["--port", "99999"], "cannot listen at 127.0.0.1, port 99999"),
        (["--host", "localhost", "--port", "0"], "base folder '{base}' does not exist"),
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


def test_a_port_that_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is said before the base is looked at."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(tmp_path / "base"), "--port", str(port)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: cannot listen at 127.0.0.1, port {port}: Address already in use; choose another")


@pytest.mark.parametrize(
    ("option", "text", "says"),
    [
        ("--api-keys", b"", "must hold a list of keys, at least one"),
        ("--api-keys", b"[]", "must hold a list of keys, at least one"),
        ("--api-keys", b"\xff\xfe", "cannot read the API keys in {path}: 'utf-8' codec"),
        ("--api-keys", b"- {name: x, key: longsecret, running: -1}", "running of 'x' must be at least 0, not -1"),
        ("--api-keys", b"- {name: x, key: longsecret, modles: [a]}", "did you mean 'models'?"),
        ("--api-keys", b"- {name: x, key: short}", "the API key of 'x' has 5 characters"),
        ("--api-keys", "- {name: x, key: schlüssel}".encode(), "the API key of 'x' must be ASCII without spaces"),
        ("--api-keys", b"- {name: x, key: 'long secret'}", "the API key of 'x' must be ASCII without spaces"),
        ("--chat-template", b"\xff", "{path} is not UTF-8 text"),
    ],
)
def test_files_that_are_wrong(
    option: str, text: bytes, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says what the file should hold; a file without keys is not taken for one that lets everybody in."""
    path = tmp_path / "given"
    path.write_bytes(text)
    assert main(["serve", str(tmp_path / "base"), option, str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert says.format(path=path) in line


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}", "the chat template is wrong in line 1"),
        ("{{ raise_exception('system first') }}", ""),
    ],
)
def test_a_chat_template_that_is_none(template: str, says: str, tmp_path: Path) -> None:
    """What is no template is refused; one that refuses some messages is not."""
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=says) if says else nullcontext():
        start._check_template(tokenizer)
