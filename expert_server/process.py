"""An expert server's process: joins a cluster, loads what the plan gives it, serves, and leaves on SIGTERM.

Threads, in the order of their start: *connections*, *compute*, *lease* and *loader*. The loader has torch imported and
the first experts loaded by one more thread, of low priority, so that a joining process takes little from those that
serve. Orphans, for which requests wait, it loads itself, at normal priority, and joins with them; so it does all later
experts.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import zmq

from expert_server import standby
from expert_server.config import Config
from expert_server.connections import Connections
from expert_server.lean_torch import release_import_pages
from expert_server.loader import Loader, targets
from expert_server.memory import default_capacity, release_free_memory
from expert_server.pace import Pace
from expert_server.read_ahead import ReadAhead
from expert_server.residency import Key, Residency
from expert_server.service import Service
from moering import transport
from moering.checkpoint import Checkpoint
from moering.drain import experts_are_elsewhere, nobody_needs, told_to_drain
from moering.errors import ConfigError, HandshakeError, MoeringError
from moering.leader import finder
from moering.lease import LeaseClient
from moering.lease_session import LeaseSession
from moering.priority import at_low_priority
from moering.process import incarnation, install_signal_handlers
from moering.protocol import Held, Lease, Leave, MemberInfo, Register, View

logger = logging.getLogger(__name__)

ALONE_S = 1.0
"""A router that lost its connection is back within 0.1 s, if it is there: who has none for so long has no router."""
DRAIN_LOOK_S = 0.05


class ExpertServer:
    """One expert server process."""

    def __init__(self, config: Config) -> None:
        if not config.checkpoint:
            raise ConfigError("--checkpoint is needed")
        self.config, self.id, self.incarnation = config, config.server_id, incarnation()
        coordinator = finder(config.join, config.membership)
        self.checkpoint = Checkpoint(config.checkpoint)
        self.residency = Residency()
        self._read = ReadAhead(self.checkpoint.expert, config.load_threads)
        transport.start_io_thread()
        socket = transport.make_socket(zmq.ROUTER, transport.DATA, queue_messages=10_000)
        self.address = transport.bind(socket, config.bind, insecure=config.insecure, advertise=config.advertise)
        self.routers = Connections(socket)
        self.service = Service(socket, self.id, self.incarnation, config.credit_rows, self.residency)
        session = LeaseSession(self._register, self._lease, self._on_view, self._on_refused)
        self.lease = LeaseClient(coordinator, session)
        pace = Pace(
            config.share_of_core(), config.expert_s(self.checkpoint.expert_bytes), lambda: self.service.calls
        )  # fmt: skip
        self.loader = Loader(self.id, self._load, self.residency, self._report, self._announce, pace.rest_s)
        self.state = "JOINING"
        self._identity = MemberInfo(
            "expert-server", self.id, self.incarnation, self.address, os.getpid(), "JOINING", config.zone, capacity=0,
            experts=0,
        )  # fmt: skip
        self.view: View | None = None
        self._fingerprint = ""
        self._prepared = threading.Event()  # torch is imported and the probe has run
        self._stop = threading.Event()
        self._terminated = False  # by SIGTERM
        self._draining = threading.Lock()
        self._failure: MoeringError | None = None

    def run(self) -> int:
        """Serve until there is no need to any more. Raises what made serving impossible."""
        install_signal_handlers(self._terminate)
        self.routers.start()
        self.service.start()
        self.lease.start()
        threading.Thread(target=self._join_cluster, name="loader", daemon=True).start()
        self._stop.wait()
        self.lease.close(Leave(self.id, self.incarnation))
        self.service.close()
        if self._failure is not None:
            raise self._failure
        return 0

    def _join_cluster(self) -> None:
        """From an empty process to ONLINE, at low priority where nobody waits for it; then after every plan."""
        background: Callable[[Callable[[], Any]], Any] = at_low_priority if self.config.nice else lambda work: work()
        try:
            background(self._prepare)
            view: View | None = None
            loaded = False
            while not loaded:
                view = self.loader.wait_for_change(view)
                if view is not None and view.layers > 0 and self.id in view.servers:
                    load = partial(self.loader.reconcile, view, online=False)
                    loaded = load() if targets(view, self.id).orphans else background(load)
            gc.freeze()
            release_free_memory()
            self.state = "ONLINE"
            self._report()
            logger.info("online at %s with %d experts", self.address, len(self.residency.keys()))
            release_import_pages()
            self._keep_loading()
        except MoeringError as e:
            self._fail(e)

    def _prepare(self) -> None:
        """Import torch and prove that this process computes rows as it should."""
        from expert_server.backend import make_backend

        c = self.config
        self._backend = make_backend(c.device, c.backend, c.threads, self.checkpoint, c.capacity, c.host_replicas)
        self._fingerprint = self._backend.fingerprint
        cp = self.checkpoint
        shape = (cp.num_layers, cp.num_experts, cp.hidden_size)
        backend = self._backend
        self.service.open(
            cp.path.name, cp.digest, shape, backend.compute, backend.max_tensor_bytes, backend.spin_s,
            backend.slot_bytes, backend.dtype, backend.pin,
        )  # fmt: skip
        self._prepared.set()

    def _keep_loading(self) -> None:
        """Follow every plan while serving: the first once more, for what was not needed to be online."""
        view: View | None = None
        while True:
            view = self.loader.wait_for_change(view)
            if view is not None:
                if self.loader.reconcile(view, online=True):
                    self._refill_host_replicas(view)
                release_free_memory()

    def _announce(self, keys: Sequence[Key]) -> None:
        """What will be loaded next, for reading ahead."""
        at_hand = self._backend.host_replicas.keys()
        self._read.announce([key for key in keys if key not in at_hand])

    def _refill_host_replicas(self, view: View) -> None:
        rest = partial(self.loader.rest, view)
        standby.refill(view, self.id, self._backend.host_replicas, self.checkpoint.expert, rest, time.monotonic)

    def _load(self, layer: int, expert: int) -> tuple[Any, bytes]:
        promoted = self._backend.host_replicas.promote((layer, expert))
        if promoted is not None:
            return promoted
        weights = self._read(layer, expert)
        return self._backend.load(weights), weights.digest

    def _fail(self, error: MoeringError) -> None:
        self._failure = error
        self._stop.set()

    # --- draining ---

    def _terminate(self) -> None:
        """SIGTERM: go once others have what is here, or no router is left, or after a while."""
        self._terminated = True
        threading.Thread(target=self._stop_when_alone, name="drain", daemon=True).start()

    def _stop_when_alone(self) -> None:
        """Whoever has left says so by his connection too: while no coordinator publishes views, by that alone."""
        self._follow_drain()
        until_s = time.monotonic() + self.config.drain_timeout_s
        while not self._stop.wait(DRAIN_LOOK_S):
            alone = self.routers.gone_for_s >= ALONE_S
            if alone or time.monotonic() >= until_s:
                logger.info("going: %s", "no router is connected any more" if alone else "the time for a drain is up")
                self._stop.set()

    def _follow_drain(self) -> None:
        """Drain, go, or stay after all, as the view and the operator want it. On any thread but the main one."""
        with self._draining:
            view, own = self.view, self._identity
            if not self._terminated and (view is None or not told_to_drain(view, own)):
                if self.state == "DRAINING":
                    logger.info("not draining any more")
                    self.state = "ONLINE"
                    self.lease.renew()
            elif self.state == "JOINING" or view is None or nobody_needs(view, own) or experts_are_elsewhere(view, own):
                self._stop.set()
            elif self.state == "ONLINE":
                logger.info("draining: others load the %d experts that are here", len(self.residency.keys()))
                self.state = "DRAINING"
                self.lease.renew()

    # --- membership ---

    def _register(self) -> Register:
        self._prepared.wait()
        held, _ = self.residency.report()
        cp = self.checkpoint
        return Register(
            self._member(), cp.path.name, cp.digest, cp.num_layers, cp.num_experts, self._fingerprint, held, view=None,
            expert_bytes=cp.expert_bytes,
        )  # fmt: skip

    def _member(self) -> MemberInfo:
        return replace(
            self._identity, state=self.state, capacity=self._capacity(), experts=len(self.residency.keys())
        )  # fmt: skip

    def _capacity(self) -> int:
        """Experts that fit; known once the backend is there, as a GPU may have less room than was asked for."""
        known = self._backend.capacity or self.config.capacity
        return known or default_capacity(self.checkpoint.packed_expert_bytes(self._backend.row_multiple))

    def _lease(self) -> Lease:
        view = self.view
        return Lease(
            self.id, self.incarnation, self.state, self.service.progress, self.service.queued, suspects=[],
            term=view.term if view else 0, epoch=view.epoch if view else 0, loads=b"",
        )  # fmt: skip

    def _on_view(self, view: View) -> None:
        self.view = view
        self.service.epoch = view.epoch
        self.loader.view_changed(view)
        self._follow_drain()

    def _on_refused(self, reason: str) -> None:
        self._fail(HandshakeError(f"the coordinator refused this server: {reason}"))

    def _report(self) -> None:
        held, digests = self.residency.report()
        self.lease.send(Held(self.id, self.incarnation, held, digests))
