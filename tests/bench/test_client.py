"""The recording client against a scripted server: what arrived, when, and each way of going wrong."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

import pytest
from aiohttp import web

from bench.client import Exchange, exchange, new_session
from tests.bench.fake_server import Handler, chat_chunk, count_to_max_tokens, event, serving, start


def ask(handler: Handler, api: str = "chat", timeout_s: float = 10, **body: Any) -> Exchange:
    async def go() -> Exchange:
        async with serving(handler) as url, new_session(timeout_s) as session:
            return await exchange(session, url, api, {"stream": True, "max_tokens": 3} | body)

    return asyncio.run(go())


def test_a_good_stream_is_recorded_whole() -> None:
    result = ask(count_to_max_tokens, max_tokens=5)
    assert result.error is None
    assert [a.text for a in result.arrivals] == [" 0", " 1", " 2", " 3", " 4"]  # neither the role nor the end counts
    assert result.finish_reason == "length"
    assert result.output_tokens == 5
    times = [result.started_s, *(a.at_s for a in result.arrivals), result.ended_s]
    assert times == sorted(times)


def test_arrival_times_tell_when_the_bytes_came() -> None:
    """The server holds the second token until the client has recorded the first and the test has taken the time."""

    async def go() -> tuple[Exchange, float]:
        release = asyncio.Event()

        async def gated(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            response = await start(request)
            await event(response, chat_chunk("a"))
            await release.wait()
            await event(response, chat_chunk("b", "stop"))
            await event(response, "[DONE]")
            return response

        async with serving(gated) as url, new_session(10) as session:
            record = Exchange()
            running = asyncio.ensure_future(exchange(session, url, "chat", {"stream": True}, record))
            while not record.arrivals:
                await asyncio.sleep(0)
            between_s = time.perf_counter()
            release.set()
            return await running, between_s

    result, between_s = asyncio.run(go())
    first, second = result.arrivals
    assert first.at_s < between_s < second.at_s


def test_ids_and_digests_are_taken_where_a_server_sends_them() -> None:
    async def handler(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await start(request)
        for ids, digests, finish in (([7, 8], ["x", "y"], None), ([9], ["z"], "length")):
            choice = {"index": 0, "text": "", "token_ids": ids, "moering": {"logits_digests": digests}}
            await event(response, {"choices": [choice | {"finish_reason": finish}]})
        await event(response, "[DONE]")
        return response

    result = ask(handler, api="completions")
    assert result.error is None
    assert (result.token_ids, result.digests, result.output_tokens) == ([7, 8, 9], ["x", "y", "z"], 3)


def test_events_cut_anywhere_and_comments_are_understood() -> None:
    async def handler(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await start(request)
        whole = ': ping\r\n\r\ndata:{"choices": [{"text": "ü", "finish_reason": "stop"}]}\r\n\r\ndata: [DONE]\r\n\r\n'
        for byte in whole.encode():
            await response.write(bytes([byte]))
            await asyncio.sleep(0)
        return response

    result = ask(handler, api="completions")
    assert (result.error, [a.text for a in result.arrivals]) == (None, ["ü"])


def test_an_answer_that_is_not_streamed() -> None:
    async def handler(request: web.Request, body: dict[str, Any]) -> web.Response:
        choice = {"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}
        return web.json_response({"choices": [choice], "usage": {"completion_tokens": 2}})

    result = ask(handler, stream=False)
    assert (result.error, result.output_tokens, result.finish_reason) == (None, 2, "stop")


async def _busy(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return web.json_response({"error": {"message": "too many"}}, status=429)


async def _error_event(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    response = await start(request)
    await event(response, chat_chunk("a"))
    await event(response, {"error": {"message": "no replica", "type": "server_error"}})
    return response


async def _cut(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    response = await start(request)
    await event(response, chat_chunk("a"))
    assert request.transport is not None
    request.transport.abort()
    return response


async def _no_done(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    response = await start(request)
    await event(response, chat_chunk("a", "stop"))
    return response


async def _no_finish_reason(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    response = await start(request)
    await event(response, chat_chunk("a"))
    await event(response, "[DONE]")
    return response


async def _garbage(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    response = await start(request)
    await event(response, "{not json")
    return response


async def _silent(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    response = await start(request)
    await event(response, chat_chunk("a"))
    await asyncio.Event().wait()
    return response


@pytest.mark.parametrize(
    ("handler", "kind"),
    [
        (_busy, "http_429"),
        (_error_event, "stream_error"),
        (_cut, "disconnected"),
        (_no_done, "truncated"),
        (_no_finish_reason, "truncated"),
        (_garbage, "bad_event"),
    ],
)
def test_each_way_of_going_wrong_has_its_kind(handler: Handler, kind: str) -> None:
    result = ask(handler)
    assert result.error == kind
    assert result.detail


def test_silence_is_a_timeout() -> None:
    assert ask(_silent, timeout_s=0.2).error == "timeout"


def test_nobody_listening_is_a_connect_error() -> None:
    async def go() -> Exchange:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # bound and not listening: refuses, and nobody else can take it
            async with new_session(5) as session:
                url = f"http://127.0.0.1:{taken.getsockname()[1]}"
                return await exchange(session, url, "chat", {"stream": True})

    assert asyncio.run(go()).error == "connect"
