"""An OpenAI server that answers from a script, on a real port."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from aiohttp import web

Handler = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]
Get = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(handler: Handler, gets: Mapping[str, Get] | None = None) -> AsyncIterator[str]:
    """The base URL of a server whose two POST endpoints call `handler(request, body)`; `gets` adds others by path."""

    async def post(request: web.Request) -> web.StreamResponse:
        return await handler(request, await request.json())

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "fake"}]})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", post)
    app.router.add_post("/v1/completions", post)
    for path, get in ({"/v1/models": models} | dict(gets or {})).items():
        app.router.add_get(path, get)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@contextmanager
def serving_in_thread(handler: Handler, gets: Mapping[str, Get] | None = None) -> Iterator[str]:
    """`serving` in a thread of its own, for callers that own their event loop."""
    loop, urls, stop, ready = asyncio.new_event_loop(), [], asyncio.Event(), threading.Event()

    async def go() -> None:
        async with serving(handler, gets) as url:
            urls.append(url)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(go(),))
    thread.start()
    try:
        assert ready.wait(60)
        yield urls[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


async def start(request: web.Request) -> web.StreamResponse:
    """Headers of a stream of events."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    return response


async def event(response: web.StreamResponse, data: Any) -> None:
    """One server-sent event; text goes as it is."""
    text = data if isinstance(data, str) else json.dumps(data)
    await response.write(f"data: {text}\n\n".encode())


def chat_chunk(content: str, finish: str | None = None) -> dict[str, Any]:
    """A chunk of a chat stream."""
    return {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": finish}], "usage": None}


async def count_to_max_tokens(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """A well-behaved chat stream of `max_tokens` tokens with usage at the end."""
    response = await start(request)
    await event(response, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    for i in range(body["max_tokens"]):
        await event(response, chat_chunk(f" {i}"))
    await event(response, chat_chunk("", "length"))
    await event(response, {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": body["max_tokens"]}})
    await event(response, "[DONE]")
    return response
