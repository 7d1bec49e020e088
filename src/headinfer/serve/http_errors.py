"""What a client is told about an error: one table from exceptions to HTTP, in the form that OpenAI's clients expect."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse

from headinfer.errors import CapacityError, HeadinferError, SessionError, StateError, UnsupportedError, UsageError
from headinfer.serve.errors import NotFoundError, QueueFullError, public

__all__ = ["BUG", "HttpError", "as_http_error", "error_response", "without_paths"]

# From the most special class to the most general one: status and code.
_TABLE: tuple[tuple[type[HeadinferError], int, str], ...] = (
    (NotFoundError, 404, "not_found"),
    (QueueFullError, 429, "queue_full"),
    (SessionError, 409, "session_conflict"),
    (CapacityError, 507, "capacity"),
    (StateError, 503, "closed"),
    (UnsupportedError, 400, "unsupported"),
    (UsageError, 400, "invalid_value"),
)
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CLOSED = "the server is being shut down: try again later"
# An absolute path, with its last name. URLs, fractions and the paths of this API are none.
_PATH = re.compile(r"(?<![\w/:.<])/(?!v1\b)(?:[^\s/'\",;:]+/)+([^\s/'\",;:]*)")


class HttpError(Exception):
    """An answer other than 200.

    Args:
        status: the HTTP status.
        message: one sentence for the client.
        code: a word for programs.
        param: the field of the request that is wrong, if one is.
        headers: headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """Return the error as JSON, in OpenAI's form."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


BUG = HttpError(
    500,
    "the server failed, and its log says why: try again, or report it",
    code="internal_error",
    headers={"Connection": "close"},  # which uvicorn does after an error, so no client may reuse it
)


def as_http_error(error: Exception, root: Path) -> HttpError:
    """Return what a client is told about an error. It contains no path of the server.

    Args:
        error: the error.
        root: the folder of all sessions.
    """
    if isinstance(error, HttpError):
        return error
    for kind, status, code in _TABLE:
        if isinstance(error, kind):
            message = _CLOSED if status == 503 else without_paths(str(public(error, root)))
            return HttpError(status, message, code=code, headers=_headers(error, status))
    return BUG


def _headers(error: Exception, status: int) -> dict[str, str]:
    """Return headers that say whether and when OpenAI's clients try again, which they would always do from 500 on."""
    if isinstance(error, QueueFullError):
        return {"Retry-After": str(error.retry_after_s)}
    return {"x-should-retry": "false"} if status in (409, 507) else {}


def without_paths(message: str) -> str:
    """Return a message with the last name of each absolute path in place of the path."""
    return _PATH.sub(r"\1", message)


def error_response(error: HttpError) -> JSONResponse:
    """Return an error as a response."""
    return JSONResponse(error.body(), error.status, error.headers)
