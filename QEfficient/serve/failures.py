# SPDX-License-Identifier: BSD-3-Clause
"""Errors on their way to a client: a status and a body in OpenAI's form."""

from typing import Any

from QEfficient.errors import (
    AdapterMismatchError,
    AdapterNotFoundError,
    AdaptersFullError,
    ArtifactError,
    ConfigError,
    QEffError,
    QueueFullError,
    UnsupportedError,
)

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}


class Refusal(QEffError):
    """A request that is answered with an error.

    Args:
        status: Of HTTP.
        message: What is wrong and what to do.
        code: For programs.
        param: The field at fault.
        retry_seconds: When to try again.
    """

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_seconds: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_seconds = status, code, param, retry_seconds

    @property
    def body(self) -> dict[str, Any]:
        """The body in OpenAI's form."""
        kind = _TYPES.get(self.status, "rate_limit_error" if self.status == 429 else "invalid_request_error")
        kind = "server_error" if self.status >= 500 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to it."""
        headers = {"retry-after": str(self.retry_seconds)} if self.retry_seconds else {}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def refusal_of(error: BaseException) -> Refusal:
    """Return what a client is told of an error; of one that is not ours, only that it happened."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, QueueFullError):
        return Refusal(503, str(error), code="queue_full", retry_seconds=1)
    if isinstance(error, AdaptersFullError):
        return Refusal(503, str(error), code="adapters_full", retry_seconds=1)
    if isinstance(error, AdapterNotFoundError):
        return Refusal(404, str(error), code="model_not_found", param="model")
    if isinstance(error, AdapterMismatchError | ArtifactError | UnsupportedError):
        return Refusal(422, str(error), code="adapter_refused", param="model")
    if isinstance(error, ConfigError):
        return Refusal(400, str(error), code="invalid_value")
    return Refusal(500, "internal error; the server's log has it", code="internal_error")
