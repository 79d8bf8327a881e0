# SPDX-License-Identifier: BSD-3-Clause
"""What is wrong with a body, in a sentence: the field as the client wrote it, and what it should be."""

from collections.abc import Mapping, Sequence
from typing import Any

from QEfficient.serve.failures import Refusal

_LONGEST_NAME = 100
_KINDS = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def refusal_of_body(errors: Sequence[Mapping[str, Any]], body: Any) -> Refusal:
    """Name one field at fault; what was sent is not sent back.

    Args:
        errors: As pydantic lists them: for a field that may be of several kinds, those of each.
        body: What was sent.
    """
    if not errors or errors[0]["type"] == "json_invalid":
        return Refusal(400, "the body is not JSON", code="invalid_value")
    paths = [_path(error, body) for error in errors]

    def tells(i: int) -> tuple[bool, int, bool, int]:
        """A field that is not known says most; then what lies deepest, and a wrong value: the client meant the kind that was read furthest."""
        kind = errors[i]["type"]
        return kind == "extra_forbidden", len(paths[i]), not kind.endswith("_type"), -i

    at = max(range(len(errors)), key=tells)
    kind, says, param = errors[at]["type"], errors[at]["msg"], ".".join(map(str, paths[at]))[:_LONGEST_NAME]
    if not param:
        message = "the body must be a JSON object, with the header content-type: application/json"
    elif kind == "extra_forbidden":
        message = f"{param}: this server does not serve this field; leave it out"
    elif kind.endswith("_type") and (given := _KINDS.get(type(errors[at].get("input")))):
        message = f"{param}: {says}, not {given}"
    else:
        message = f"{param}: {says}"
    return Refusal(400, message, code="invalid_value", param=param or None)


def _path(error: Mapping[str, Any], body: Any) -> list[str | int]:
    """Return the way to a field through the body: pydantic's own names the kinds that it tried as well."""
    path: list[str | int] = []
    parts = list(error["loc"])[1:]
    for i, part in enumerate(parts):
        there = part in body if isinstance(body, dict) else isinstance(body, list) and isinstance(part, int)
        if there:
            body = body[part]
        elif not (error["type"] == "missing" and i == len(parts) - 1):
            continue
        path.append(part)
    return path
