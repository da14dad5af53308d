"""Writing responses under watch: server-sent events, and whole JSON bodies."""

from __future__ import annotations

import io
import json
from typing import Any

from aiohttp import web

from gateway.offload import MANY, offload
from gateway.stall import StallGuard, Watched

DONE = b"data: [DONE]\n\n"


def dumps(value: Any, in_pieces: bool = False) -> bytes:
    """Compact JSON in UTF-8. Lone surrogates, which a client's own text may hold, become escapes.

    `in_pieces`: it takes longer, but other threads run meanwhile.
    """
    try:
        return _text(value, False, in_pieces).encode()
    except UnicodeEncodeError:
        return _text(value, True, in_pieces).encode()


def _text(value: Any, ensure_ascii: bool, in_pieces: bool) -> str:
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, separators=(",", ":"))
    if not in_pieces:
        return encoder.encode(value)
    text = io.StringIO()
    text.writelines(encoder.iterencode(value))
    return text.getvalue()


async def dumps_offloaded(value: Any, size: int) -> bytes:
    """`dumps` of a value that holds `size` numbers or texts, in a thread if they are many."""
    return await offload(size, dumps, value, size >= MANY)


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

    async def send(self, event: dict[str, Any], size: int = 0) -> None:
        """Write one event, of `size` values; waits only for this connection, and only when its buffer is full."""
        await self.write(b"data: " + await dumps_offloaded(event, size) + b"\n\n")

    async def write(self, data: bytes) -> None:
        """Write bytes that are whole events."""
        if self._response is None:
            headers = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
            self._response = web.StreamResponse(headers=headers)
            await self._response.prepare(self._request)
        self._watched.sent_bytes += len(data)
        await self._response.write(data)


async def send_json(request: web.Request, guard: StallGuard, body: Any, size: int = 0) -> web.StreamResponse:
    """Write a whole JSON response, of `size` values, under watch: aiohttp itself would wait for a reader for ever."""
    response = web.Response(body=await dumps_offloaded(body, size), content_type="application/json")
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the client is gone")
    with guard.watch(transport) as watched:
        watched.sent_bytes = len(response.body or b"")  # type: ignore[arg-type]
        await response.prepare(request)
        await response.write_eof()
    return response
