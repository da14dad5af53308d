"""A small HTTP client for the launcher and the command line: JSON in and out, errors as one sentence."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPResponse
from typing import Any, cast

from moering.errors import MoeringError

MAX_ERROR_BYTES = 1 << 16

# Proxies are for the world outside; the environment's would also catch requests to this machine.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class HttpError(MoeringError):
    """No answer (`status` 0), or one with an error status; the text is the server's own where it sent one."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


def base(url: str) -> str:
    """A gateway's address, of which users may have the form that `Ready:` shows and OpenAI's clients want: with /v1."""
    return url.rstrip("/").removesuffix("/v1")


def request(url: str, body: object = None, timeout_s: float = 10.0, key: str | None = None) -> HTTPResponse:
    """GET `url`, or POST `body` to it as JSON. The caller reads and closes the response. Raises `HttpError`.

    `timeout_s` bounds the connection and each wait for bytes. `key` is sent as a bearer token.
    """
    if not url.startswith(("http://", "https://")):
        raise HttpError(f"{url} is not an http:// or https:// address")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        response = _OPENER.open(urllib.request.Request(url, data, headers), timeout=timeout_s)
    except urllib.error.HTTPError as e:
        with e:
            raise HttpError(_error_text(url, e), e.code) from None
    except (OSError, HTTPException, ValueError) as e:
        raise HttpError(f"{url} does not answer: {getattr(e, 'reason', None) or e}") from e
    return cast(HTTPResponse, response)


def get_json(url: str, timeout_s: float = 10.0, key: str | None = None) -> Any:
    """The JSON document at `url`. Raises `HttpError`."""
    return read_json(request(url, timeout_s=timeout_s, key=key), url)


def read_json(response: HTTPResponse, url: str) -> Any:
    """The JSON document that `response` brings; closes it. Raises `HttpError`."""
    with response:
        try:
            return json.load(response)
        except (OSError, HTTPException, ValueError) as e:
            raise HttpError(f"{url} does not answer with JSON: {e}") from e


def _error_text(url: str, error: urllib.error.HTTPError) -> str:
    """The message of an OpenAI error body, or the bare status."""
    try:
        return str(json.loads(error.read(MAX_ERROR_BYTES))["error"]["message"])
    except (OSError, HTTPException, ValueError, KeyError, TypeError):
        return f"{url} answers {error.code} {error.reason}"
