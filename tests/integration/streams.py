"""Concurrent streams as their clients see them, each read to the end of its connection by a thread of its own."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moering.errors import MoeringError
from moering.http_client import request
from tests.integration.cluster import DEADLINE_S

Body = dict[str, Any]


def bodies(count: int, max_tokens: int) -> list[Body]:
    """Requests with prompts of different lengths, greedy and seeded in turn, that never end early."""
    greedy, seeded = {"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.95}
    return [
        {
            "model": "tiny",
            "prompt": [20 + (7 * i + 3 * j) % 280 for j in range(4 + 3 * i)],
            "max_tokens": max_tokens,
            "stream": True,
            "ignore_eos": True,
            "return_token_ids": True,
            "moering": {"logits_digest": True},
            **(seeded | {"seed": 1000 + i} if i % 2 else greedy),
        }
        for i in range(count)
    ]


@dataclass
class Stream:
    """What one client got. `ends` are its terminal events: finish reasons, error events, a broken connection."""

    tokens: list[int] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    done_lines: int = 0
    renormalized: int = 0
    closed: bool = False
    longest_gap_s: float = 0.0
    chunks: list[Body] = field(default_factory=list)  # as they came, of the answer and of the usage


class Streams:
    """Starts all requests at once."""

    def __init__(self, url: str, bodies: Sequence[Body]) -> None:
        self.streams = [Stream() for _ in bodies]
        self._url = url
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._read, args=pair, daemon=True)
            for pair in zip(bodies, self.streams, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def wait_tokens(self, each: int) -> None:
        """Until every stream has got so many tokens; none may have ended before."""
        self._wait_tokens([each] * len(self.streams))

    def wait_tokens_more(self, each: int) -> None:
        """Until every stream has got so many tokens more than it has now; none may have ended before."""
        self._wait_tokens([len(s.tokens) + each for s in self.streams])

    def _wait_tokens(self, wanted: list[int]) -> None:
        def reached() -> bool:
            return all(len(s.tokens) >= n for s, n in zip(self.streams, wanted, strict=True))

        with self._changed:
            assert self._changed.wait_for(lambda: any(s.closed for s in self.streams) or reached(), DEADLINE_S), (
                f"{[len(s.tokens) for s in self.streams]} tokens, not {wanted}"
            )
        assert not any(s.closed for s in self.streams), "too late: a stream has ended already"

    @property
    def over(self) -> bool:
        """Whether every connection has been closed by the server."""
        return all(s.closed for s in self.streams)

    def finish(self) -> list[Stream]:
        """Until every connection has been closed by the server."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.over, DEADLINE_S), (
                f"still open: {[(len(s.tokens), s.ends) for s in self.streams if not s.closed]}"
            )
        return self.streams

    def _read(self, body: Body, stream: Stream) -> None:
        last_s = 0.0
        try:
            with request(f"{self._url}/v1/completions", body, DEADLINE_S) as response:
                for line in response:
                    if line.startswith(b"data:"):
                        now_s = time.monotonic()
                        stream.longest_gap_s = max(stream.longest_gap_s, now_s - (last_s or now_s))
                        last_s = now_s
                        self._take(stream, line[5:].strip())
        except (OSError, MoeringError, ValueError) as e:
            stream.ends.append(f"{type(e).__name__}: {e}")
        with self._changed:
            stream.closed = True
            self._changed.notify_all()

    def _take(self, stream: Stream, data: bytes) -> None:
        with self._changed:
            if data == b"[DONE]":
                stream.done_lines += 1
            elif "error" in (chunk := json.loads(data)):
                stream.ends.append(f"error event: {chunk['error']}")
            else:
                stream.chunks.append(chunk)
                for choice in chunk["choices"]:
                    stream.tokens += choice["token_ids"]
                    stream.digests += choice["moering"]["logits_digests"]
                    stream.renormalized += choice["moering"].get("renormalized_tokens", 0)
                    stream.ends += [choice["finish_reason"]] if choice["finish_reason"] else []
            self._changed.notify_all()


def check_equal(seen: Sequence[Stream], reference: Sequence[Stream]) -> None:
    """Every stream brought what it brought in the run without a failure, and ended once."""
    for index, (stream, wanted) in enumerate(zip(seen, reference, strict=True)):
        end = f"stream {index} of {len(stream.tokens)} tokens ended with {stream.ends}, {stream.done_lines} done lines"
        assert (stream.ends, stream.done_lines) == (["length"], 1), end
        assert stream.tokens == wanted.tokens, f"stream {index}"
        assert stream.digests == wanted.digests, f"stream {index}: equal tokens from other logits"
