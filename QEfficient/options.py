# SPDX-License-Identifier: BSD-3-Clause
"""One dataclass per command: its fields are the options, the help and the validation.

Knows argparse and dataclasses; knows no command. A field's type may be ``str``, ``int``, ``float``, ``bool``,
``Path``, one of those ``| None``, or ``list`` of one of those (the option may then be repeated).
"""

import argparse
import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from QEfficient.errors import ConfigError

T = TypeVar("T")


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    choices: Sequence[str] | None = None,
    metavar: str | None = None,
    positional: bool = False,
) -> Any:
    """Declare a dataclass field that is also a command-line option.

    Args:
        default: Value when the option is not given; omit it to make the option required.
        help: One sentence for ``--help``; the default is appended.
        choices: The only values allowed.
        metavar: What ``--help`` shows for the value.
        positional: Take the value by position instead of by ``--name``.
    """
    metadata = {"help": help, "choices": choices, "metavar": metavar, "positional": positional}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def from_dict(cls: type[T], values: dict[str, Any], *, source: str) -> T:
    """Build the dataclass ``cls`` from ``values``, refusing unknown keys and wrong types.

    Args:
        cls: A dataclass whose fields were declared with :func:`option`.
        values: Field values, for example read from a YAML file.
        source: Where the values come from; named in errors.

    Raises:
        ConfigError: A key is unknown (with a suggestion), missing, or its value has the wrong type.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f"{source}: unknown option {key!r}{suggest(key, fields)}")
        checked[key] = _coerce(value, hints[key], fields[key], source)
    missing = [
        name
        for name, f in fields.items()
        if name not in checked and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{source}: missing option {missing[0]!r}")
    return cls(**checked)


def parse(cls: type[T], argv: Sequence[str], *, prog: str, description: str = "", **defaults: Any) -> T:
    """Parse ``argv`` into the dataclass ``cls``.

    Args:
        cls: A dataclass whose fields were declared with :func:`option`.
        argv: Arguments after the command's name.
        prog: The command's name, for usage and help.
        description: First paragraph of the help; default: the docstring of ``cls``.
        **defaults: Values that replace the fields' defaults, checked like :func:`from_dict`.

    Raises:
        ConfigError: An option is unknown (with a suggestion), missing or has a wrong value.
    """
    given = vars(make_parser(cls, prog=prog, description=description).parse_args(list(argv)))
    return from_dict(cls, {**defaults, **given}, source=prog)


def make_parser(cls: type, *, prog: str, description: str = "") -> argparse.ArgumentParser:
    """Return the parser that :func:`parse` uses; options that were not given are absent from its result."""
    parser = _Parser(
        prog=prog,
        description=description or inspect.cleandoc(cls.__doc__ or ""),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind, is_list = _value_type(hints[f.name])
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        kwargs: dict[str, Any] = {"help": _help(f), "metavar": f.metadata.get("metavar")}
        if f.metadata.get("choices"):
            kwargs["choices"] = f.metadata["choices"]
        if f.metadata.get("positional"):
            parser.add_argument(f.name, type=kind, **kwargs)
            continue
        flags = sorted({f"--{f.name}", f"--{f.name.replace('_', '-')}"}, reverse=True)[::-1]
        if kind is bool:
            parser.add_argument(*flags, action=_BoolAction, dest=f.name, required=required, **kwargs)
        elif is_list:
            parser.add_argument(*flags, action="append", type=kind, dest=f.name, required=required, **kwargs)
        else:
            kwargs["metavar"] = kwargs["metavar"] or (None if f.metadata.get("choices") else kind.__name__.upper())
            parser.add_argument(*flags, type=kind, dest=f.name, required=required, **kwargs)
    return parser


class _Parser(argparse.ArgumentParser):
    """argparse that raises ConfigError, and suggests the option that was meant."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        # First of all, since a misspelt option is also a missing one, and argparse would complain of that.
        known = [s for a in self._actions for s in a.option_strings if s.startswith("--")]
        for name in (str(a).split("=")[0] for a in args or () if str(a).startswith("--")):
            if name not in known:
                raise ConfigError(
                    f"{self.prog}: unknown option {name!r}{suggest(name, known)} (see {self.prog} --help)"
                )
        parsed, extra = self.parse_known_args(args, namespace)
        if extra:
            raise ConfigError(f"{self.prog}: unexpected argument {extra[0]!r} (see {self.prog} --help)")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message} (see {self.prog} --help)")


class _BoolAction(argparse.Action):
    """``--flag``, ``--no-flag``, ``--flag=true`` and ``--flag=false``."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        negative = [f"--no-{s[2:]}" for s in option_strings if s.startswith("--")]
        kwargs.pop("metavar", None)
        super().__init__([*option_strings, *negative], dest, nargs="?", metavar="true|false", **kwargs)

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        value = True if values is None else _parse_bool(values, option_string)
        setattr(namespace, self.dest, value != str(option_string).startswith("--no-"))


def _parse_bool(text: str, name: str) -> bool:
    lowered = text.lower()
    if lowered in {"true", "yes", "1", "on"}:
        return True
    if lowered in {"false", "no", "0", "off"}:
        return False
    raise ConfigError(f"{name} takes true or false, not {text!r}")


def _value_type(hint: Any) -> tuple[type, bool]:
    """Return the element type of a field, and whether the field is a list."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return _value_type(next(a for a in typing.get_args(hint) if a is not type(None)))
    if origin is list:
        return typing.get_args(hint)[0], True
    return hint, False


def _coerce(value: Any, hint: Any, field: Any, source: str) -> Any:
    kind, is_list = _value_type(hint)
    if value is None and type(None) in typing.get_args(hint):
        return None
    if is_list:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{source}: {field.name} must be a list, not {value!r}")
        return [_coerce_one(v, kind, field.name, source) for v in value]
    coerced = _coerce_one(value, kind, field.name, source)
    choices = field.metadata.get("choices")
    if choices and coerced not in choices:
        raise ConfigError(f"{source}: {field.name} must be one of {', '.join(choices)}, not {value!r}")
    return coerced


def _coerce_one(value: Any, kind: type, name: str, source: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):  # YAML reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            pass
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{source}: {name} must be {kind.__name__}, not {value!r}")


def _help(f: Any) -> str:
    text = str(f.metadata.get("help", "")).replace("%", "%%")
    if f.default is dataclasses.MISSING or f.default is None or f.default == "":
        return text
    return f"{text} [default: {f.default}]".replace("%%%%", "%%")
