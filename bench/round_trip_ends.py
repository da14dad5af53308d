"""The two things that `bench.round_trip` times: a dispatch through `Exchange`, and raw zmq frames of the same sizes."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import zmq

from moering import protocol
from moering.checkpoint import Checkpoint
from moering.errors import MoeringError
from moering.expert_frames import Dispatch, Reply
from moering.process import incarnation
from moering.protocol import Hello, MemberInfo, View
from moering.shared_rows import SLOTS
from router.connection import Connection
from router.exchange import Exchange
from router.expert_rows import HostRows

CONNECT_S = 30.0


@dataclass
class Batch:
    """Rows of one layer, as an engine would submit them (see `router.exchange.Rows`)."""

    layer: int
    hidden: np.ndarray
    topk_ids: np.ndarray
    output: np.ndarray
    prefill: bool = False

    @classmethod
    def random(cls, rows: int, checkpoint: Checkpoint) -> Batch:
        """Rows that go to random experts, the same at each call."""
        rng, hidden_size, top_k = np.random.default_rng(rows), checkpoint.hidden_size, checkpoint.top_k
        ids = np.stack([rng.permutation(checkpoint.num_experts)[:top_k] for _ in range(rows)])
        hidden = rng.standard_normal((rows, hidden_size), np.float32)
        return cls(0, hidden, ids.astype(np.int64), np.empty((rows * top_k, hidden_size), np.float32))

    @property
    def expert_rows(self) -> HostRows:
        """See `router.exchange.Rows`."""
        return HostRows(self.hidden, self.output)


class TimedExchange(Exchange):
    """Keeps what the server says of the time that it computed."""

    compute_us = 0

    def _put(self, connection: Connection, reply: Reply, tensor: memoryview | None) -> None:
        self.compute_us = reply.compute_us
        super()._put(connection, reply, tensor)


class Ours:
    """Round trips through an `Exchange` that is connected to one server holding all experts."""

    def __init__(self, checkpoint: Checkpoint, server: dict[str, Any]) -> None:
        self._poller, self._layers = zmq.Poller(), checkpoint.num_layers
        hello = Hello(
            "bench", incarnation(), checkpoint.path.name, checkpoint.digest, shared_slots=SLOTS
        )  # fmt: skip
        self._exchange = TimedExchange(hello, checkpoint.hidden_size, self._poller, time.monotonic)
        member = MemberInfo(
            "expert-server", server["id"], server["incarnation"], server["address"], server["pid"], "ONLINE", "", 0, 0
        )  # fmt: skip
        layers, experts = checkpoint.num_layers, checkpoint.num_experts
        routing = np.zeros((layers, experts, 1), "<i2").tobytes()
        self._exchange.view_changed(
            View(1, 1, [member], [member.server_id], layers, experts, 1, routing, routing, 1, 0, 0, 0)
        )  # fmt: skip
        give_up_s = time.monotonic() + CONNECT_S
        while self._exchange.suspects:  # until it has welcomed us
            if time.monotonic() > give_up_s:
                raise MoeringError(f"the expert server at {member.address} does not answer")
            self._exchange.handle(self._poller.poll(100))

    def trip(self, batch: Batch) -> tuple[float, float]:
        """(whole, computed at the server) in µs. Layers take turns, as in a forward: weights are not in the cache."""
        batch.layer = (batch.layer + 1) % self._layers
        started_ns = time.perf_counter_ns()
        self._exchange.submit(batch)
        while not (finished := self._exchange.take_finished()):
            self._exchange.handle(self._poller.poll())
        whole_us = (time.perf_counter_ns() - started_ns) / 1000
        if len(finished[0].missing):
            raise MoeringError("the expert server lost an expert, or died")
        return whole_us, float(self._exchange.compute_us)

    def close(self) -> None:
        """Close the connection."""
        self._exchange.close()


class Raw:
    """Blocking round trips of frames with the sizes of a dispatch and its reply."""

    def __init__(self, address: str) -> None:
        self._socket: Any = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)
        self._frames: list[bytes] = []

    def resize(self, request: tuple[int, int], reply: tuple[int, int]) -> None:
        """Bytes of (header, tensor) both ways."""
        self._frames = [bytes(size) for size in request]
        self._socket.send_multipart([b"", *(str(size).encode() for size in reply)])
        self._socket.recv_multipart()

    def trip(self) -> float:
        """Its time in µs."""
        started_ns = time.perf_counter_ns()
        self._socket.send_multipart(self._frames)
        self._socket.recv_multipart()
        return (time.perf_counter_ns() - started_ns) / 1000

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


def frame_bytes(rows: int, top_k: int, hidden_size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Bytes of (header, tensor) of a dispatch of `rows` rows, all to one server, and of its reply."""
    big, pairs = incarnation(), rows * top_k
    request = Dispatch(big, 1000, 0, False, bytes(4 * pairs), "float32", rows, hidden_size)
    reply = Reply(big, 1000, big, 1000, "float32", pairs, hidden_size)
    row_bytes = 4 * hidden_size
    return (len(protocol.encode(request)), rows * row_bytes), (len(protocol.encode(reply)), pairs * row_bytes)


@contextlib.contextmanager
def echo(endpoint: str) -> Iterator[str]:
    """The raw peer's process; its address."""
    process = subprocess.Popen([sys.executable, "-m", "bench.echo", endpoint], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()
