# SPDX-License-Identifier: BSD-3-Clause
"""The report as JSON, and the JSON Schema of it.

Both follow from the dataclasses of ``report``: a field's name there is the key here. Two keys are added for readers that
want nothing else: ``verdict`` (``"pass"`` or ``"fail"``) and ``summary`` (one sentence). Numbers that are not finite
become ``null``; the check's ``message`` says what they were. ``schema_version`` grows when a key changes its meaning or
goes; a new key alone does not change it.
"""

import dataclasses
import json
import math
import types
import typing
from enum import StrEnum
from typing import Any

from QEfficient.testing.report import Report


def render(report: Report) -> str:
    """Return the report as indented JSON."""
    return json.dumps(_finite(report.to_dict()), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read(text: str) -> Report:
    """Return the report that :func:`render` wrote."""
    return Report.from_dict(json.loads(text))


def schema() -> dict[str, Any]:
    """Return the JSON Schema of :func:`render`'s output."""
    top = _schema(Report)
    top["properties"] |= {"verdict": {"enum": ["pass", "fail"]}, "summary": {"type": "string"}}
    top["required"] += ["verdict", "summary"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "qefficient test report", **top}


def _schema(hint: Any) -> dict[str, Any]:
    """Return the schema of one type annotation."""
    plain = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
    if hint in plain:
        return {"type": plain[hint]}
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return {"enum": [member.value for member in hint]}
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        names = [f.name for f in dataclasses.fields(hint)]
        return {"type": "object", "properties": {n: _schema(hints[n]) for n in names}, "required": names}
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return {"anyOf": [_schema(a) for a in arguments]}
    if typing.get_origin(hint) in (list, tuple):
        items = _schema(arguments[0])
        return {"type": "array", "items": {"anyOf": [items, {"type": "null"}]} if arguments[0] is float else items}
    return {"type": "object", "additionalProperties": _schema(arguments[1])}


def _finite(value: Any) -> Any:
    """Replace numbers that JSON cannot express by None."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
