"""Refusals in the form OpenAI's clients understand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from ...core.errors import one_line

CLIENT_GONE = 499
"""The status in the log when nobody was left to answer."""

_MAX_MESSAGE = 600
"""Characters: a message quotes the value it refuses, which may be as long as the body."""

_TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """An answer other than success. `param`: the field of the request it is about; `code`: for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = one_line(message, _MAX_MESSAGE)
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code},
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def bad_field(name: str, message: str, *, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, param=name, code=code)


def not_accepted(name: str, value: object, accepted: str) -> ApiError:
    """`value` of field `name` is of no use; `accepted` says what is."""
    return bad_field(name, f"{name} is {value!r}; accepted: {accepted}")
