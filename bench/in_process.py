"""A router that has all experts in its own process: what the price of disaggregation is measured against.

``python -m bench.in_process --checkpoint DIR --bind ipc:///tmp/in-process --threads 2`` serves gateways like a router,
with the same engine; only the exchange is another one. No coordinator is needed.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import torch
import zmq

from moering import transport
from moering.checkpoint import Checkpoint
from moering.process import incarnation, install_signal_handlers, run_main
from router.config import Config
from router.dispatch import Dispatcher
from router.exchange import Finished
from router.flight import Flight
from router.frontend import Frontend
from router.process import build_engine
from tests.local_experts import LocalExperts

NONE = np.empty(0, np.int64)


class LocalExchange:
    """Computes at once what `router.exchange.Exchange` would send away."""

    def __init__(self, experts: LocalExperts | None, threads: int) -> None:
        """Without `experts` the decoder has computed them."""
        self.dispatcher = Dispatcher()  # for its counters, all zero
        self.changed = False
        self.acquainted = True
        self.due_s = math.inf  # nothing is waited for
        self.passed_over: dict[str, str] = {}
        self._experts, self._threads = experts, threads
        self._finished: list[Finished] = []

    def submit(self, flight: Flight, slots: np.ndarray | None = None) -> None:
        """Compute the experts of the flight's layer."""
        if self._experts is not None:
            torch.set_num_threads(self._threads)
            self._experts.run(flight.micro_batch)
        self._finished.append(Finished(flight, NONE, NONE, NONE))

    def take_finished(self) -> list[Finished]:
        """What `submit` has computed."""
        finished, self._finished = self._finished, []
        return finished

    def handle(self, ready: list[tuple[Any, int]]) -> None:
        """There is nobody to hear from."""

    def tick(self) -> None:
        """Nothing is ever late."""

    def connect_missing(self) -> None:
        """There is nobody to connect to."""

    def close(self) -> None:
        """There is nothing to close."""


class BusyPoller(zmq.Poller):
    """Does not wait while a forward is under way: its next layer can be computed at once."""

    busy = staticmethod(lambda: False)

    def poll(self, timeout: int | None = None) -> list[tuple[Any, int]]:
        """See `zmq.Poller.poll`."""
        return super().poll(0 if self.busy() else timeout)


def run(config: Config) -> int:
    """Serve until SIGTERM."""
    checkpoint = Checkpoint(config.checkpoint)
    socket = transport.make_socket(zmq.ROUTER, queue_messages=100_000)
    transport.bind(socket, config.bind)
    poller = BusyPoller()
    exchange = LocalExchange(LocalExperts(checkpoint) if config.device == "cpu" else None, config.threads)
    frontend = Frontend(
        socket, config.server_id, incarnation(), config.max_num_seqs, checkpoint.path.name, checkpoint.digest
    )  # fmt: skip
    decoder = _decoder_class(config.device)
    engine = build_engine(config, checkpoint, exchange, frontend, poller, decoder)  # type: ignore[arg-type]
    poller.busy = staticmethod(lambda: bool(exchange._finished))  # type: ignore[method-assign]
    install_signal_handlers(engine.stop)
    print(f"listening on {config.bind}", flush=True)
    engine.run()
    return 0


def _decoder_class(device: str) -> type | None:
    if device == "cpu":
        return None
    from bench.in_process_cuda import WholeDecoder

    return WholeDecoder


if __name__ == "__main__":
    sys.exit(run_main("bench.in_process", Config, run))
