"""A router's process: joins a cluster, loads all weights but the experts', serves gateways, leaves on SIGTERM."""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from dataclasses import replace
from functools import partial

import zmq

from moering import transport
from moering.checkpoint import Checkpoint
from moering.drain import another_serves, requests_are_elsewhere, told_to_drain
from moering.errors import ConfigError, HandshakeError
from moering.leader import finder
from moering.lease import LeaseClient
from moering.lease_session import LeaseSession
from moering.priority import at_low_priority
from moering.process import incarnation, install_signal_handlers
from moering.protocol import Hello, Lease, Leave, MemberInfo, Register, View
from moering.shared_rows import MAX_SLOTS, SLOTS, Pin
from router.catch_up import CatchUp
from router.config import Config
from router.engine import Engine
from router.exchange import Exchange
from router.frontend import Frontend

logger = logging.getLogger(__name__)

DRAIN_LOOK_S = 0.05
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
        transport.start_io_thread()
        socket = transport.make_socket(zmq.ROUTER, queue_messages=100_000)
        self.address = transport.bind(socket, config.bind, insecure=config.insecure, advertise=config.advertise)
        poller = zmq.Poller()
        slots = min(MAX_SLOTS, SLOTS * config.in_flight)
        hello = Hello(
            self.id, self.incarnation, self.model, self.checkpoint.digest, shared_slots=slots,
            dtype="bfloat16" if config.device == "cuda" else "float32",
        )  # fmt: skip
        self.exchange = Exchange(hello, self.checkpoint.hidden_size, poller, time.monotonic, _pin(config))
        frontend = Frontend(
            socket, self.id, self.incarnation, config.max_num_seqs, self.model, self.checkpoint.digest
        )  # fmt: skip
        build = partial(build_engine, config, self.checkpoint, self.exchange, frontend, poller)
        self.engine = at_low_priority(build) if config.nice else build()
        session = LeaseSession(self._register, self._lease, self._on_view, self._on_refused)
        self.lease = LeaseClient(coordinator, session)
        self.state = "ONLINE"
        self._identity = MemberInfo(
            "router", self.id, self.incarnation, self.address, os.getpid(), self.state, config.zone, capacity=0,
            experts=0,
        )  # fmt: skip
        self._view: View | None = None
        self._terminated = False  # by SIGTERM
        self._refusal: str | None = None

    def run(self) -> int:
        """Serve until SIGTERM. Raises `HandshakeError` when the coordinator refuses this router for good."""
        install_signal_handlers(self._terminate)
        self.lease.start()
        gc.collect()
        gc.freeze()  # the weights' objects need no more visits
        logger.info("online at %s, numerics %s", self.address, self.engine.numerics)
        self.engine.run()
        self.lease.close(Leave(self.id, self.incarnation))
        if self._refusal is not None:
            raise HandshakeError(f"the coordinator refused this router: {self._refusal}")
        return 0

    def _register(self) -> Register:
        c = self.checkpoint
        member = replace(self._identity, state=self.state)
        return Register(
            member, self.model, c.digest, c.num_layers, c.num_experts, self.engine.numerics, held=b"", view=None
        )  # fmt: skip

    def _lease(self) -> Lease:
        engine, view = self.engine, self.engine.view
        term, epoch = (view.term, view.epoch) if view is not None else (0, 0)
        return Lease(
            self.id, self.incarnation, self.state, engine.progress, engine.queued, self.exchange.suspects,
            term, epoch, engine.take_loads().astype("<f4").tobytes(), self.exchange.wedged,
        )  # fmt: skip

    def _on_view(self, view: View) -> None:
        self._view = view
        self.engine.view_changed(view)
        self._follow_drain()

    # --- draining ---

    def _terminate(self) -> None:
        """SIGTERM: go once the streams here have ended, or after a while."""
        self._terminated = True
        self._follow_drain()

    def _follow_drain(self) -> None:
        """Go if somebody wants it. Gateways give no new requests to a router that drains; there is no way back.

        A signal may call it within the main thread's own writing of a line to the log: it writes none.
        """
        view, own = self._view, self._identity
        if self.state == "DRAINING" or not (self._terminated or (view is not None and told_to_drain(view, own))):
            return
        if view is None or not another_serves(view, own):  # streams wait for the next incarnation anyway
            self.engine.stop()
            return
        self.state = "DRAINING"
        self.lease.renew()
        threading.Thread(target=self._stop_when_idle, name="drain", daemon=True).start()

    def _stop_when_idle(self) -> None:
        logger.info("draining: %d requests may finish within %g s", self.engine.queued, self.config.drain_timeout_s)
        until_s = time.monotonic() + self.config.drain_timeout_s
        while time.monotonic() < until_s and not self._may_go():
            time.sleep(DRAIN_LOOK_S)
        if self.engine.queued:
            logger.info("handing over %d requests to other routers", self.engine.queued)
        elif not self.engine.gateways:
            logger.info("going: no gateway is connected any more")
        self.engine.stop()

    def _may_go(self) -> bool:
        return requests_are_elsewhere(self._view, self._identity, self.engine.queued, self.engine.gateways)

    def _on_refused(self, reason: str) -> None:
        self._refusal = reason
        self.engine.stop()


def _pin(config: Config) -> Pin | None:
    if config.device == "cpu":
        return None
    from kernels.pinning import pin

    return pin


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
        parts.block_size, limit, StepCost(), model.vocab_size, config.in_flight,
    )  # fmt: skip
    return Engine(
        parts.decoder, scheduler, exchange, frontend, poller, sampler=parts.sampler, threads=config.threads,
        micro_batches=config.in_flight, missing_expert_timeout_s=config.missing_expert_timeout_s,
        catch_up=CatchUp(config.catch_up_lock),
        spin_s=transport.SPIN_S if config.device == "cuda" else 0.0,
    )  # fmt: skip
