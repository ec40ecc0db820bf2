"""What the server answers when it cannot do what was asked, in the shape of OpenAI's API.

Invariant: every answer that is not a success has the body {"error": {"message", "type", "param", "code"}}.
"""

import json
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

CLIENT_GONE = 499
"""Nobody reads it; nginx's number for this."""
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
ADVICE = {
    404: "nothing is at this address; /openapi.json lists what is",
    405: "this address does not take this method; the header Allow says which it takes",
}


class Refusal(Exception):
    """A request that is not served; the message says rule, value and remedy in one line."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return json_response(self.body(), self.status, self.headers)


def to_json(value: Any) -> str:
    """JSON of ASCII characters: half a surrogate pair in a message cannot break it. Refuses NaN by ValueError."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, media_type="application/json")


def say_refusal(_: Request, error: Exception) -> Response:
    """Starlette's handler for `Refusal`, for exceptions of its own, and for a fault of this program."""
    if isinstance(error, Refusal):
        return error.response()
    if isinstance(error, HTTPException):
        message = ADVICE.get(error.status_code, str(error.detail))
        return Refusal(error.status_code, message, headers=error.headers).response()
    if isinstance(error, ClientDisconnect):  # in the middle of its body
        return Response(status_code=CLIENT_GONE)
    return Refusal(500, "the server failed; its standard error says why", code="internal_error").response()
