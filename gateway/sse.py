"""Writing responses under watch: server-sent events, and whole JSON bodies."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

from gateway.stall import StallGuard, Watched

DONE = b"data: [DONE]\n\n"


def dumps(value: Any) -> bytes:
    """Compact JSON in UTF-8. Lone surrogates, which a client's own text may hold, become escapes."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()


class EventStream:
    """A stream of `data:` events. The response starts with the first event, so that a failure before it can still
    have its own status.
    """

    def __init__(self, request: web.Request, watched: Watched) -> None:
        self._request, self._watched = request, watched
        self._response: web.StreamResponse | None = None

    @property
    def response(self) -> web.StreamResponse | None:
        """The response, once the first event was written."""
        return self._response

    async def send(self, event: dict[str, Any]) -> None:
        """Write one event; waits only for this connection, and only when its buffer is full."""
        await self.write(b"data: " + dumps(event) + b"\n\n")

    async def write(self, data: bytes) -> None:
        """Write bytes that are whole events."""
        if self._response is None:
            headers = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
            self._response = web.StreamResponse(headers=headers)
            await self._response.prepare(self._request)
        self._watched.sent_bytes += len(data)
        await self._response.write(data)


async def send_json(request: web.Request, guard: StallGuard, body: Any) -> web.StreamResponse:
    """Write a whole JSON response under watch: aiohttp itself would wait for a reader for ever."""
    response = web.Response(body=dumps(body), content_type="application/json")
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the client is gone")
    with guard.watch(transport) as watched:
        watched.sent_bytes = len(response.body or b"")  # type: ignore[arg-type]
        await response.prepare(request)
        await response.write_eof()
    return response
