"""A client of OpenAI's streaming API that records when each event arrived.

It needs no field that OpenAI's servers do not send. `token_ids` and the digests of the sampled logits are recorded
where a server adds them to its chunks (``return_token_ids``, ``{"moering": {"logits_digest": true}}``).
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
DONE = b"[DONE]"


@dataclass(slots=True)
class Arrival:
    """New output in one chunk. `at_s` is `time.perf_counter` when its bytes were read from the socket."""

    at_s: float
    text: str
    token_ids: list[int]
    digests: list[str]

    @property
    def tokens(self) -> int:
        """How many tokens arrived: known where the server sends their ids, else one."""
        return len(self.token_ids) or 1


@dataclass(slots=True)
class Exchange:
    """One request as its client saw it.

    `error` is None or a kind: "http_<status>", "connect", "timeout", "disconnected" (the connection broke),
    "stream_error" (the server sent an error event), "bad_event" (not the JSON of a chunk), "truncated" (the stream
    ended without ``[DONE]`` or a finish reason).
    """

    started_s: float = 0.0
    ended_s: float = 0.0
    arrivals: list[Arrival] = field(default_factory=list)
    finish_reason: str | None = None
    usage_tokens: int | None = None
    error: str | None = None
    detail: str = ""

    @property
    def token_ids(self) -> list[int]:
        """All ids of the output, in order of arrival."""
        return [i for a in self.arrivals for i in a.token_ids]

    @property
    def digests(self) -> list[str]:
        """All digests of sampled logits, in order of arrival."""
        return [d for a in self.arrivals for d in a.digests]

    @property
    def output_tokens(self) -> int:
        """Tokens of the output: from `usage` when the server sent it, else counted from the chunks."""
        return sum(a.tokens for a in self.arrivals) if self.usage_tokens is None else self.usage_tokens


class _EndedError(Exception):
    """The exchange is over because of `args[0]`, the kind of error, with a detail in `args[1]`."""


def new_session(timeout_s: float, api_key: str | None = None) -> aiohttp.ClientSession:
    """A session without a limit of connections. `timeout_s` bounds connecting and the wait for the next byte."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s),
        headers=headers,
    )


async def exchange(
    session: aiohttp.ClientSession, url: str, api: str, body: dict[str, Any], record: Exchange | None = None
) -> Exchange:
    """Send one request and record its answer. Never raises for what a server or the network does.

    `record` is filled while the answer comes, for a caller that wants to watch it.
    """
    result = Exchange() if record is None else record
    result.started_s = time.perf_counter()
    try:
        async with session.post(url.rstrip("/") + PATHS[api], json=body) as response:
            if response.status != 200:
                raise _EndedError(f"http_{response.status}", (await response.text())[:300])
            if body.get("stream"):
                await _read_stream(response, result)
            else:
                _take_chunk(result, time.perf_counter(), await response.read())
    except _EndedError as e:
        result.error, result.detail = e.args
    except TimeoutError as e:  # aiohttp's own timeouts included
        result.error, result.detail = "timeout", str(e)
    except aiohttp.ClientConnectorError as e:
        result.error, result.detail = "connect", str(e)
    except (aiohttp.ClientError, ConnectionError) as e:
        result.error, result.detail = "disconnected", f"{type(e).__name__}: {e}"
    result.ended_s = time.perf_counter()
    return result


async def _read_stream(response: aiohttp.ClientResponse, result: Exchange) -> None:
    async for at_s, data in _events(response):
        if data == DONE:
            if result.finish_reason is None:
                raise _EndedError("truncated", "[DONE] without a finish reason")
            return
        _take_chunk(result, at_s, data)
    raise _EndedError("truncated", "the stream ended without [DONE]")


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[float, bytes]]:
    """The `data` of each server-sent event, with the time its last byte was read. Comments are skipped."""
    rest = b""
    async for piece in response.content.iter_any():
        at_s = time.perf_counter()
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield at_s, line[5:].strip()


def _take_chunk(result: Exchange, at_s: float, data: bytes) -> None:
    """Add what one chunk, or a whole answer, holds to `result`."""
    try:
        chunk = json.loads(data)
        if "error" in chunk:
            raise _EndedError("stream_error", str(chunk["error"])[:300])
        usage = chunk.get("usage")
        if usage:
            result.usage_tokens = int(usage["completion_tokens"])
        for choice in chunk["choices"]:
            arrival = _arrival(at_s, choice)
            if arrival.text or arrival.token_ids:
                result.arrivals.append(arrival)
            result.finish_reason = choice.get("finish_reason") or result.finish_reason
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise _EndedError("bad_event", f"{data[:200]!r}: {type(e).__name__}") from e


def _arrival(at_s: float, choice: dict[str, Any]) -> Arrival:
    part = choice.get("delta") or choice.get("message") or choice
    text = (part.get("reasoning_content") or "") + (part.get("content") or part.get("text") or "")
    digests = (choice.get("moering") or {}).get("logits_digests") or []
    return Arrival(at_s, text, list(choice.get("token_ids") or []), list(digests))
