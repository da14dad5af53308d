"""A gateway's end of the protocol, to ask a router's engine without HTTP: tokens, digests of the logits, seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import aiohttp
import zmq

from moering import protocol, transport
from moering.errors import MoeringError
from moering.protocol import Abort, Failed, Hello, Sampling, Submit, Token, Tokens

ANSWER_S = 300


@dataclass(frozen=True)
class Answers:
    """New tokens of each prompt, the digests of the logits they were taken from, and the seconds all took together."""

    outputs: list[list[int]]
    digests: list[list[str | None]]
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """New tokens by the time, that of the prompts included."""
        return sum(map(len, self.outputs)) / self.seconds


class EngineClient:
    """Asks one router."""

    def __init__(self, address: str, timeout_s: float = ANSWER_S) -> None:
        """`timeout_s`: of the wait for one answer."""
        self._socket = transport.make_socket(zmq.DEALER)
        self._socket.rcvtimeo = int(timeout_s * 1000)
        transport.connect(self._socket, address)
        self._socket.send(protocol.encode(Hello("bench", time.time_ns(), "", "")))
        self._runs = self._asked = 0

    def ask(self, prompts: list[list[int]], tokens: int, digests: bool = False) -> None:
        """Send requests for `tokens` new tokens of each prompt, greedily; `answers` brings them."""
        self._runs, self._asked = self._runs + 1, len(prompts)
        for i, prompt in enumerate(prompts):
            sampling = Sampling(max_tokens=tokens, temperature=0.0, logits_digest=digests)
            self._socket.send(protocol.encode(Submit(f"{self._runs}-{i}", 0, prompt, [], sampling, ANSWER_S)))

    def answers(self) -> list[tuple[int, Token]]:
        """The next tokens of the last `ask`, each with the index of its prompt.

        Raises `MoeringError` when a request failed, or no answer came in time.
        """
        while True:
            try:
                message, _ = protocol.decode(self._socket.recv_multipart())
            except zmq.Again:
                raise MoeringError("the engine does not answer") from None
            if isinstance(message, Failed):
                raise MoeringError(f"a request failed: {message.message}")
            if isinstance(message, Tokens):
                ids = [t.request_id.split("-") for t in message.tokens]
                found = [(int(i), t) for (run, i), t in zip(ids, message.tokens, strict=True) if int(run) == self._runs]
                if found:
                    return found

    def abort(self) -> None:
        """End what the last `ask` asked for; what still comes of it is not for `answers`."""
        for i in range(self._asked):
            transport.try_send(self._socket, [protocol.encode(Abort(f"{self._runs}-{i}", 0))])

    def close(self) -> None:
        """Close the socket; the router aborts what it still computes for it."""
        self._socket.close(0)

    def generate(self, prompts: list[list[int]], tokens: int, digests: bool = False) -> Answers:
        """`tokens` new tokens of each prompt, greedily, all at once. Raises `MoeringError` when a request fails."""
        started_s = time.perf_counter()
        self.ask(prompts, tokens, digests)
        outputs: list[list[int]] = [[] for _ in prompts]
        seen: list[list[str | None]] = [[] for _ in prompts]
        running = len(prompts)
        while running:
            for index, t in self.answers():
                outputs[index].append(t.token_id)
                seen[index].append(t.logits_digest)
                running -= t.finish_reason is not None
        return Answers(outputs, seen, time.perf_counter() - started_s)


async def first_router(url: str) -> dict[str, Any]:
    """The first router of the cluster behind `url`, as /admin/status lists it."""
    return (await _routers(url))[0]


async def router_address(url: str) -> str:
    """Where it listens."""
    return (await router_addresses(url))[0]


async def router_addresses(url: str) -> list[str]:
    """Where all routers of the cluster behind `url` listen."""
    return [str(router["address"]) for router in await _routers(url)]


async def _routers(url: str) -> list[dict[str, Any]]:
    async with aiohttp.ClientSession() as session, session.get(url + "/admin/status") as response:
        processes: list[dict[str, Any]] = (await response.json())["processes"]
    return [p for p in processes if p["kind"] == "router"]
