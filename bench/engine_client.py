"""A gateway's end of the protocol, to ask a router's engine without HTTP: tokens, digests of the logits, seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass

import aiohttp
import zmq

from moering import protocol, transport
from moering.errors import MoeringError
from moering.protocol import Failed, Hello, Sampling, Submit, Token, Tokens

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

    def __init__(self, address: str) -> None:
        self._socket = transport.make_socket(zmq.DEALER)
        self._socket.rcvtimeo = ANSWER_S * 1000
        transport.connect(self._socket, address)
        self._socket.send(protocol.encode(Hello("gateway", "bench", time.time_ns(), "", "")))
        self._runs = 0

    def ask(self, prompts: list[list[int]], tokens: int, digests: bool = False) -> None:
        """Send requests for `tokens` new tokens of each prompt, greedily; `answers` brings them."""
        self._runs += 1
        for i, prompt in enumerate(prompts):
            sampling = Sampling(max_tokens=tokens, temperature=0.0, logits_digest=digests)
            self._socket.send(protocol.encode(Submit(f"{self._runs}-{i}", 0, prompt, [], sampling, ANSWER_S)))

    def answers(self) -> list[tuple[int, Token]]:
        """The next tokens, each with the index of its prompt. Raises `MoeringError` when a request failed."""
        while True:
            message, _ = protocol.decode(self._socket.recv_multipart())
            if isinstance(message, Failed):
                raise MoeringError(f"a request failed: {message.message}")
            if isinstance(message, Tokens):
                return [(int(t.request_id.split("-")[1]), t) for t in message.tokens]

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


async def router_address(url: str) -> str:
    """Where the first router of the cluster behind `url` listens."""
    async with aiohttp.ClientSession() as session, session.get(url + "/admin/status") as response:
        processes = (await response.json())["processes"]
    return next(str(p["address"]) for p in processes if p["kind"] == "router")
