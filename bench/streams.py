"""Concurrent streams for the fault bench: the same fixed requests over and over, each recorded."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from bench.client import Exchange, exchange
from bench.workload import Lengths

# Ids below this are special tokens in most vocabularies.
FIRST_ID = 20


def fixed_requests(
    count: int, model: str, prompt: Lengths, output: Lengths, vocab_size: int, seed: int
) -> list[dict[str, Any]]:
    """Bodies for the completions API: token ids in and out, every second one sampled with a seed, the others greedy.

    They use extensions of moering: `ignore_eos`, `return_token_ids`, and a digest of the sampled logits per token.
    """
    bodies = []
    for index in range(count):
        rng = random.Random(f"{seed}/{index}")
        sampling: dict[str, Any] = {"temperature": 0.0}
        if index % 2:
            sampling = {"temperature": 0.8, "top_p": 0.95, "seed": rng.randrange(1 << 31)}
        bodies.append(
            {
                "model": model,
                "prompt": [rng.randrange(FIRST_ID, vocab_size) for _ in range(prompt.draw(rng))],
                "max_tokens": output.draw(rng),
                "stream": True,
                "ignore_eos": True,
                "return_token_ids": True,
                "moering": {"logits_digest": True},
                **sampling,
            }
        )
    return bodies


@dataclass
class Recorded:
    """One exchange of one stream: `request` is the index of its body."""

    stream: int
    request: int
    exchange: Exchange


@dataclass
class Streams:
    """`count` clients; client i sends the bodies i, i + count, … in turn."""

    session: aiohttp.ClientSession
    url: str
    bodies: list[dict[str, Any]]
    count: int
    recorded: list[Recorded] = field(default_factory=list)
    running: dict[int, Exchange] = field(default_factory=dict)
    request: dict[int, int] = field(default_factory=dict)  # of each stream, the body that it sent last

    async def once(self) -> None:
        """Send every body once."""
        await asyncio.gather(*(self._round(stream) for stream in range(self.count)))

    async def until(self, stop: asyncio.Event) -> None:
        """Go round until `stop` is set; streams under way then run to their end."""
        await asyncio.gather(*(self._rounds(stream, stop) for stream in range(self.count)))

    def flowing(self) -> bool:
        """Whether every stream has a request under way whose first token has come."""
        return len(self.running) == self.count and all(e.arrivals for e in self.running.values())

    async def _rounds(self, stream: int, stop: asyncio.Event) -> None:
        while not stop.is_set():
            await self._round(stream, stop)

    async def _round(self, stream: int, stop: asyncio.Event | None = None) -> None:
        for request in range(stream, len(self.bodies), self.count):
            if stop and stop.is_set():
                return
            record = self.running[stream] = Exchange()
            self.request[stream] = request
            await exchange(self.session, self.url, "completions", self.bodies[request], record)
            del self.running[stream]
            self.recorded.append(Recorded(stream, request, record))
            if record.error:
                await asyncio.sleep(0.2)  # a server that refuses at once is not to be hammered
