"""A gateway's end of the protocol, to ask a router's engine without HTTP: tokens, digests of the logits, seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass

import zmq

from moering import protocol, transport
from moering.errors import MoeringError
from moering.protocol import Failed, Hello, Sampling, Submit, Tokens

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

    def generate(self, prompts: list[list[int]], tokens: int, digests: bool = False) -> Answers:
        """`tokens` new tokens of each prompt, greedily, all at once. Raises `MoeringError` when a request fails."""
        self._runs += 1
        started_s = time.perf_counter()
        for i, prompt in enumerate(prompts):
            sampling = Sampling(max_tokens=tokens, temperature=0.0, logits_digest=digests)
            self._socket.send(protocol.encode(Submit(f"{self._runs}-{i}", 0, prompt, [], sampling, ANSWER_S)))
        outputs: list[list[int]] = [[] for _ in prompts]
        seen: list[list[str | None]] = [[] for _ in prompts]
        running = len(prompts)
        while running:
            message, _ = protocol.decode(self._socket.recv_multipart())
            if isinstance(message, Failed):
                raise MoeringError(f"a request failed: {message.message}")
            for t in message.tokens if isinstance(message, Tokens) else ():
                index = int(t.request_id.split("-")[1])
                outputs[index].append(t.token_id)
                seen[index].append(t.logits_digest)
                running -= t.finish_reason is not None
        return Answers(outputs, seen, time.perf_counter() - started_s)
