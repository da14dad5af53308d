"""`python -m router`: joins a cluster, loads all weights but the experts', serves gateways, leaves on SIGTERM."""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from collections.abc import Sequence

import numpy as np
import zmq

from moering import transport
from moering.checkpoint import Checkpoint
from moering.errors import ConfigError, HandshakeError
from moering.leader import finder
from moering.lease import LeaseClient
from moering.process import incarnation, install_signal_handlers, run_main
from moering.protocol import Hello, Lease, Leave, MemberInfo, Register
from router.config import Config
from router.engine import Engine
from router.exchange import Exchange
from router.frontend import Frontend

logger = logging.getLogger(__name__)

LIKELY_STREAMS = 16  # the cache keeps room for each of so many sequences to grow in one piece


class Router:
    """One router process."""

    def __init__(self, config: Config) -> None:
        if not config.checkpoint:
            raise ConfigError("--checkpoint is needed")
        self.config, self.id, self.incarnation = config, config.server_id, incarnation()
        coordinator = finder(config.join, config.membership)
        self.checkpoint = Checkpoint(config.checkpoint)
        self.model = self.checkpoint.path.name
        socket = transport.make_socket(zmq.ROUTER, queue_messages=100_000)
        self.address = transport.bind(socket, config.bind, insecure=config.insecure, advertise=config.advertise)
        poller = zmq.Poller()
        hello = Hello("router", self.id, self.incarnation, self.model, self.checkpoint.digest)
        self.exchange = Exchange(hello, poller, time.monotonic)
        frontend = Frontend(
            socket, self.id, self.incarnation, config.max_num_seqs, self.model, self.checkpoint.digest
        )  # fmt: skip
        self.engine = build_engine(config, self.checkpoint, self.exchange, frontend, poller)
        self.lease = LeaseClient(
            coordinator, self._register, self._lease, self.engine.view_changed, self._on_refused
        )  # fmt: skip
        self._refusal: str | None = None

    def run(self) -> int:
        """Serve until SIGTERM. Raises `HandshakeError` when the coordinator refuses this router for good."""
        install_signal_handlers(self.engine.stop)
        self.lease.start()
        gc.collect()
        gc.freeze()  # the weights' objects need no more visits
        logger.info("online at %s", self.address)
        self.engine.run()
        self.lease.close(Leave(self.id, self.incarnation))
        if self._refusal is not None:
            raise HandshakeError(f"the coordinator refused this router: {self._refusal}")
        return 0

    def _register(self) -> Register:
        c = self.checkpoint
        member = MemberInfo(
            "router", self.id, self.incarnation, self.address, os.getpid(), "ONLINE", self.config.zone, 0, 0
        )  # fmt: skip
        return Register(member, self.model, c.digest, c.num_layers, c.num_experts, "", b"", None)

    def _lease(self) -> Lease:
        engine, view = self.engine, self.engine.view
        loads, engine.loads = engine.loads, np.zeros_like(engine.loads)
        term, epoch = (view.term, view.epoch) if view is not None else (0, 0)
        return Lease(
            self.id, self.incarnation, "ONLINE", engine.progress, engine.queued, 0.0, self.exchange.suspects,
            term, epoch, loads.astype("<f4").tobytes(), self.exchange.wedged,
        )  # fmt: skip

    def _on_refused(self, reason: str) -> None:
        self._refusal = reason
        self.engine.stop()


def build_engine(
    config: Config,
    checkpoint: Checkpoint,
    exchange: Exchange,
    frontend: Frontend,
    poller: zmq.Poller,
    decoder_class: type | None = None,
) -> Engine:
    """Load the weights and put the engine together; `decoder_class` stands in for the device's. Imports torch."""
    from router.device import build_parts, max_length
    from router.kv_cache import BlockManager
    from router.model_config import MoEModelConfig
    from router.prefix_cache import PrefixCache
    from router.scheduler import Scheduler
    from router.step_cost import StepCost

    parts, model = build_parts(config, checkpoint, decoder_class), MoEModelConfig.from_checkpoint(checkpoint)
    limit = max_length(config, model)
    span = max(1, min(parts.num_blocks // LIKELY_STREAMS, -(-limit // parts.block_size)))
    prefixes = PrefixCache(parts.block_size, parts.copy_block, config.prefix_caching)
    scheduler = Scheduler(
        BlockManager(parts.num_blocks, prefixes, span), prefixes, config.max_num_seqs, config.max_num_batched_tokens,
        parts.block_size, limit, StepCost(), model.vocab_size,
    )  # fmt: skip
    return Engine(
        parts.decoder, scheduler, exchange, frontend, poller, sampler=parts.sampler, threads=config.threads,
        micro_batches=config.micro_batches, missing_expert_timeout_s=config.missing_expert_timeout_s,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_main("router", Config, lambda config: Router(config).run(), argv)


if __name__ == "__main__":
    sys.exit(main())
