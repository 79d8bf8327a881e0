# SPDX-License-Identifier: BSD-3-Clause
"""Dataclasses as commands."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from QEfficient.errors import ConfigError
from QEfficient.options import from_dict, make_parser, option, parse


@dataclass(slots=True, kw_only=True)
class Example:
    """An example command."""

    base: str = option(help="The base.", positional=True)
    learning_rate: float = option(1e-3, "Peak rate.")
    steps: int | None = option(None, "Steps.")
    adapter: list[str] = option([], "Adapters.")
    mode: str = option("fast", "Mode.", choices=["fast", "slow"])
    verbose: bool = option(False, "Talk.")
    out: Path | None = option(None, "Folder.")


def test_values_of_every_type() -> None:
    """Both spellings of a name, repeated options, switches and paths arrive typed."""
    argv = ["b", "--learning-rate", "2", "--steps=3", "--adapter", "x=1", "--adapter", "y=2", "--verbose", "--out", "o"]
    made = parse(Example, argv, prog="p")
    assert made == Example(base="b", learning_rate=2.0, steps=3, adapter=["x=1", "y=2"], verbose=True, out=Path("o"))
    assert parse(Example, ["b", "--learning_rate", "2"], prog="p").learning_rate == 2.0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["b", "--learning-rte", "1"], r"p: unknown option '--learning-rte'; did you mean '--learning-rate'\?"),
        (["b", "--stepz=1"], r"unknown option '--stepz'; did you mean '--steps'\?"),
        (["b", "c"], "unexpected argument 'c'"),
        ([], "required: base"),
        (["b", "--steps", "x"], "invalid int value: 'x'"),
        (["b", "--mode", "quick"], "invalid choice: 'quick'"),
        (["b", "--verbose=perhaps"], "takes true or false, not 'perhaps'"),
    ],
)
def test_wrong_arguments(argv: list[str], message: str) -> None:
    """Each mistake is one sentence that names the value, and the option that was meant."""
    with pytest.raises(ConfigError, match=message):
        parse(Example, argv, prog="p")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base": "b", "lerning_rate": 1}, r"f: unknown option 'lerning_rate'; did you mean 'learning_rate'\?"),
        ({"base": "b", "steps": "many"}, "f: steps must be int, not 'many'"),
        ({"base": "b", "steps": True}, "f: steps must be int, not True"),
        ({"base": "b", "adapter": "x"}, "f: adapter must be a list, not 'x'"),
        ({"base": "b", "mode": "quick"}, "f: mode must be one of fast, slow, not 'quick'"),
        ({}, "f: missing option 'base'"),
    ],
)
def test_wrong_files(values: dict[str, object], message: str) -> None:
    """A file's values are held to the same rules."""
    with pytest.raises(ConfigError, match=message):
        from_dict(Example, values, source="f")


def test_numbers_as_yaml_reads_them() -> None:
    """YAML takes 1e-3 for text and 1 for an integer: both are floats here."""
    made = from_dict(Example, {"base": "b", "learning_rate": "1e-3"}, source="f")
    assert made.learning_rate == 1e-3
    assert from_dict(Example, {"base": "b", "learning_rate": 1}, source="f").learning_rate == 1.0


def test_help_shows_defaults() -> None:
    """Help is made from the fields."""
    text = make_parser(Example, prog="p").format_help()
    assert "Peak rate. [default: 0.001]" in text
    assert "An example command." in text
