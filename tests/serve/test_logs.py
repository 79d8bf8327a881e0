# SPDX-License-Identifier: BSD-3-Clause
"""The log: JSON lines and nothing else."""

import json
import logging

import pytest

from QEfficient.serve.logs import configure, log

NAMES = ("", "qefficient", "uvicorn", "uvicorn.error")


def test_every_line_is_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Ours, uvicorn's and those of libraries that nobody thought of, each once."""
    for logger in map(logging.getLogger, NAMES):
        for field in ("handlers", "propagate", "level"):
            monkeypatch.setattr(logger, field, getattr(logger, field))
    configure()
    log("ready", adapters=2)
    logging.getLogger("uvicorn.error").error("in use")
    logging.getLogger("asyncio").warning("socket.send() raised exception.")
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(e["level"], e["event"]) for e in told] == [
        ("info", "ready"),
        ("error", "in use"),
        ("warning", "socket.send() raised exception."),
    ]
    assert told[0]["adapters"] == 2
