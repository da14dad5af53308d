"""How fast an engine decodes when all streams do: prompts, and streams that start late or end early, do not count."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from bench.engine_client import EngineClient
from moering.errors import MoeringError

MOST_TOKENS = 480
"""Of each stream: a prompt and its output are to fit in one block of 512 keys."""


@dataclass(frozen=True)
class Rate:
    """Tokens that came between the start of the last stream and the end of the measurement."""

    streams: int
    tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Of all streams together."""
        return self.tokens / self.seconds


def decode_rate(
    client: EngineClient, prompts: list[list[int]], window_s: float, least_tokens: int, limit_s: float = 30.0
) -> Rate:
    """Run all prompts at once for `window_s`, and until each has brought `least_tokens` more; then abort them.

    Raises `MoeringError` where that takes longer than `limit_s`.
    """
    begun_s = time.perf_counter()
    client.ask(prompts, MOST_TOKENS)
    first: set[int] = set()
    started_s, tokens = 0.0, 0
    try:
        while True:
            answers = client.answers()
            now = time.perf_counter()
            if len(first) == len(prompts):
                tokens += len(answers)
            else:
                first |= {index for index, _ in answers}
                started_s = now
            enough = tokens >= least_tokens * len(prompts) and now - started_s >= window_s
            if tokens and (enough or any(t.finish_reason for _, t in answers)):
                return Rate(len(prompts), tokens, now - started_s)
            if now - begun_s > limit_s:
                raise MoeringError(f"{len(prompts)} streams: {len(first)} began and {tokens} tokens in {limit_s:g} s")
    finally:
        client.abort()


def decode_together(
    clients: list[EngineClient], prompts: list[list[list[int]]], window_s: float, least_tokens: int
) -> float:
    """Tokens/s of several engines that decode at the same time, each client with its own prompts; see `decode_rate`."""
    with ThreadPoolExecutor(len(clients)) as pool:
        rates = pool.map(lambda client, mine: decode_rate(client, mine, window_s, least_tokens), clients, prompts)
        return sum(rate.tokens_per_s for rate in rates)
