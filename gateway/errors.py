"""The one error that handlers raise, and its OpenAI body."""

from __future__ import annotations

from typing import Any

_TYPES = {404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error", 504: "timeout_error"}

# Code of a `Failed` message (or of this gateway) → HTTP status, Retry-After in seconds.
FAILURES: dict[str, tuple[int, int | None]] = {
    "bad_request": (400, None),
    "context_length": (400, None),
    "no_replica": (503, 5),
    "overloaded": (503, 1),
    "no_router": (503, 5),
    "timeout": (504, None),
    "poison": (500, None),
    "internal": (500, None),
}


class ApiError(Exception):
    """Ends a request with `status` and OpenAI's nested error body. The text is for the client: no paths in it."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """`Retry-After` where trying again can help."""
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400."""
    return ApiError(400, message, param, code)


def failure(code: str, message: str) -> ApiError:
    """The error for a request that a router or this gateway gave up with `code`."""
    status, retry_after_s = FAILURES.get(code, (500, None))
    return ApiError(status, message, code=code, retry_after_s=retry_after_s)
