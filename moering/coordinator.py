"""`python -m moering.coordinator`: the zmq shell around `moering.membership`.

One bound socket, one thread, a blocking poll. Never on the data path: while it is away, everything serves on with its
last view, and back it learns from its members what it was. With ``--membership etcd://…`` several of them run, and only
the elected one takes part: it decides as a single one would, but a view leaves it only once etcd has taken that.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import zmq

from moering import protocol, transport
from moering.actions import Action, Probe, Rules, Send
from moering.cluster_key import KEY_HELP
from moering.config import check_numbers, option
from moering.errors import ConfigError, ProtocolError
from moering.event_feed import EventFeed
from moering.leader import EMBEDDED, MEMBERSHIP_HELP, etcd_cluster
from moering.membership import Membership
from moering.office import Elected, Fence, Published
from moering.probe import EndpointProbe
from moering.process import incarnation, install_signal_handlers, run_main
from moering.protocol import MemberInfo, Refused, View

if TYPE_CHECKING:
    from moering.election import Election

logger = logging.getLogger("moering.coordinator")  # not `__main__`, which it is when it runs

TICK_S = 0.05
BATCH = 256
"""At most so many messages are taken in before time passes, so that no flood of them keeps leases from being judged."""


@dataclass(frozen=True)
class Config:
    """Keep the members of a cluster together: leases, the placement of experts, and the view that all share."""

    bind: str = option("tcp://127.0.0.1:7000", "zmq endpoint that members join; port * takes a free one")
    id: str = option("coordinator", "name in status and logs")
    expert_servers: int = option(0, "expert servers to wait for before the first plan; 0: those who come")
    replication: int = option(2, "expert servers that hold each expert; one less may die at once")
    lease_s: float = option(10.0, "a member that does not renew for so many seconds is dead; they renew every second")
    rejoin_grace_s: float = option(5.0, "seconds that a dead server's share waits for its restart")
    membership: str = option(EMBEDDED, MEMBERSHIP_HELP)
    election_ttl_s: int = option(3, "with etcd: a coordinator silent for so long is replaced; etcd's least is 2")
    settle_s: float = option(15.0, "longest wait for --expert-servers, from the first one on")
    allow_inexact: bool = option(False, "admit expert servers and routers whose results differ in the last bits")
    rebalance_s: float = option(60.0, "look so often whether experts' popularity calls for moves; 0: never")
    key: str = option("", KEY_HELP)
    insecure: bool = option(False, "allow --bind on an address that other machines reach without a key")
    advertise: str = option("", "host name that members use, where it is not the bound one")

    def __post_init__(self) -> None:
        """Raises `ConfigError` for what a coordinator cannot work with."""
        not_negative = ("expert_servers", "rejoin_grace_s", "settle_s", "rebalance_s")
        check_numbers(self, positive=("replication",), not_negative=not_negative)
        if not 2.0 <= self.lease_s < math.inf:
            raise ConfigError(f"lease_s {self.lease_s:g}: members renew every second, so at least 2, and finite")
        if self.election_ttl_s < 2:
            raise ConfigError(f"election_ttl_s {self.election_ttl_s} is below 2, etcd's shortest lease")


class Coordinator:
    """Socket, probes and clock of one `Membership`."""

    def __init__(self, config: Config, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.socket = transport.make_socket(zmq.ROUTER, queue_messages=10_000)
        self.address = transport.bind(self.socket, config.bind, insecure=config.insecure, advertise=config.advertise)
        self._rules = Rules(
            config.expert_servers, config.replication, config.lease_s, config.rejoin_grace_s, config.settle_s,
            config.allow_inexact, config.rebalance_s,
        )  # fmt: skip
        self._own = MemberInfo(
            "coordinator", config.id, incarnation(), self.address, os.getpid(), "ONLINE", zone="", capacity=0, experts=0
        )  # fmt: skip
        self.membership = Membership(self._rules, self._own, clock(), epoch_s=self._epoch_s())
        self._feed = EventFeed()
        self.bad_frames = 0
        self._wakeup = transport.Wakeup()
        self._fence = Fence()
        self._election = make_election(config, self._own, self._wakeup.set)
        self.leading = self._election is None
        self._stopping = False
        self._probes: dict[tuple[str, int], EndpointProbe] = {}
        self._poller = zmq.Poller()
        self._poller.register(self.socket, zmq.POLLIN)
        self._poller.register(self._wakeup.fd, zmq.POLLIN)

    def stop(self) -> None:
        """Make `run` return. May be called from a signal handler."""
        self._stopping = True
        self._wakeup.set()

    def run(self) -> None:
        """Serve until `stop`."""
        if self._election is not None:
            self._election.start()
        next_tick_s = self._clock()
        while not self._stopping:
            if dict(self._poller.poll(max(0, int((next_tick_s - self._clock()) * 1000)))).get(self._wakeup.fd):
                self._wakeup.clear()
            self._follow_election()
            self._receive()
            self._finish_probes()
            if self._clock() >= next_tick_s:
                if self.leading:
                    self._act(self.membership.tick(self._clock()))
                    self._feed.send(self.membership, self.socket)
                    if self.membership.told_to_leave:  # not `|=`: a signal in its midst would be forgotten
                        self._stopping = True
                next_tick_s = self._clock() + TICK_S
        self.close()

    def close(self) -> None:
        """Give up the office, and release the sockets."""
        if self._election is not None:
            self._election.close()
        self._drop_probes()
        self._wakeup.close()
        self.socket.close()

    def _epoch_s(self) -> float:
        return time.time() - self._clock()

    def _follow_election(self) -> None:
        for event in () if self._election is None else self._election.take():
            if isinstance(event, Published):
                self._act(self._fence.published(event.view))
                continue
            self._drop_probes()
            self._fence = Fence()
            self.leading = isinstance(event, Elected)
            if isinstance(event, Elected):
                self.membership = Membership(self._rules, self._own, self._clock(), event.term, self._epoch_s())
                self._feed = EventFeed()
                if event.view is not None:
                    self.membership.succeed(event.view, self._clock())

    def _receive(self) -> None:
        for _ in range(BATCH):
            frames = transport.try_receive(self.socket)
            if frames is None:
                return
            sender = frames[0]
            if not self.leading:
                self._act([Send(sender, Refused("this coordinator is not the elected one", fatal=False))])
                continue
            try:
                message, _ = protocol.decode(frames[1:])
                self._act(self.membership.handle(sender, message, self._clock()))
            except ProtocolError as e:
                self.bad_frames += 1
                logger.warning("bad message %d, answered with an error: %s", self.bad_frames, e)
                self._act([Send(sender, Refused(str(e), fatal=False))])

    def _act(self, actions: Sequence[Action]) -> None:
        encoded: tuple[View, bytes] | None = None
        for action in actions:
            if isinstance(action, Probe):
                self._start_probe(action)
                continue
            message = action.message
            if isinstance(message, View) and self._election is not None and self._fence.holds(action.identity, message):
                self._election.publish(message)
                continue
            if isinstance(message, View):  # one view for all: encoded once
                if encoded is None or encoded[0] is not message:
                    encoded = message, protocol.encode(message)
                header = encoded[1]
            else:
                header = protocol.encode(message)
            if not transport.try_send(self.socket, [action.identity, header]):
                logger.debug("a member is gone or does not read; it gets the next view when it renews its lease")

    def _start_probe(self, action: Probe) -> None:
        key = action.server_id, action.incarnation
        try:
            probe = self._probes[key] = EndpointProbe(action.address, self._clock())
        except (OSError, ValueError) as e:
            logger.warning("cannot probe %s at %s (%s); leaving it to its lease", action.server_id, action.address, e)
            return
        self._poller.register(probe.fd, zmq.POLLIN | zmq.POLLERR)

    def _finish_probes(self) -> None:
        for key, probe in list(self._probes.items()):
            answer = probe.answer(self._clock())
            if answer is not None:
                self._poller.unregister(probe.fd)
                probe.close()
                del self._probes[key]
                logger.info("own probe of %s: %s", key[0], answer)
                self._act(self.membership.probe_result(*key, answer, self._clock()))

    def _drop_probes(self) -> None:
        for probe in self._probes.values():
            self._poller.unregister(probe.fd)
            probe.close()
        self._probes.clear()


def make_election(config: Config, own: MemberInfo, wake: Callable[[], None]) -> Election | None:
    """The election that `config` asks for; None for a single coordinator. Raises `ConfigError`."""
    cluster = etcd_cluster(config.membership)
    if cluster is None:
        return None
    from moering.election import Election  # only here: it needs aiohttp

    return Election(cluster, own, config.election_ttl_s, wake)


def run(config: Config) -> int:
    """Serve until SIGTERM."""
    coordinator = Coordinator(config)
    install_signal_handlers(coordinator.stop)
    print(f"listening on {coordinator.address}", flush=True)
    coordinator.run()
    logger.info("stopped")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_main("coordinator", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
