"""How a process finds the coordinator: at a fixed address, or at that of the one elected through etcd."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from moering.errors import ConfigError
from moering.loop_thread import LoopThread

if TYPE_CHECKING:
    from moering.etcd import Cluster, Entry

logger = logging.getLogger(__name__)

EMBEDDED = "embedded://"
MEMBERSHIP_HELP = (
    "where coordinators are elected: etcd://host:port,host:port…[/name], or embedded:// for a single one, at --join"
)
RETRY_S = 0.5
LOOK_S = 5.0
"""Members look at least so often who is elected, also without news from etcd."""


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a coordinator is. `election` differs from one election to the next, also at one address."""

    address: str
    election: int = 0


class Finder(Protocol):
    """Knows the coordinator's seat; None while it is not known. `start` makes it call `changed` at every news."""

    @property
    def seat(self) -> Seat | None:
        """The newest seat."""
        ...

    def start(self, changed: Callable[[], object]) -> None:
        """Begin to look."""
        ...

    def close(self) -> None:
        """Stop looking."""
        ...


def etcd_cluster(membership: str) -> Cluster | None:
    """What ``--membership`` names; None for a single coordinator. Raises `ConfigError`."""
    if membership == EMBEDDED:
        return None
    if not membership.startswith("etcd://"):
        raise ConfigError(f"membership {membership!r} is neither {EMBEDDED} nor etcd://host:port,…")
    from moering.etcd import Cluster  # only here: it needs aiohttp, which takes time and memory to import

    return Cluster.parse(membership)


def finder(join: str, membership: str) -> Finder:
    """The way to the coordinator that the two options name. Raises `ConfigError`."""
    cluster = etcd_cluster(membership)
    return Fixed(Seat(join)) if cluster is None else LeaderWatch(cluster)


@dataclass(frozen=True)
class Fixed:
    """A single coordinator that never moves."""

    seat: Seat

    def start(self, changed: Callable[[], object]) -> None:
        """Nothing will change."""

    def close(self) -> None:
        """Nothing to stop."""


class LeaderWatch:
    """Follows the leader's key in etcd. While etcd is away, or nobody is elected, the last seat stands."""

    def __init__(self, cluster: Cluster) -> None:
        self.seat: Seat | None = None
        self._cluster = cluster
        self._changed: Callable[[], object] = lambda: None
        self._thread = LoopThread("leader-watch", self._follow)

    def start(self, changed: Callable[[], object]) -> None:
        """Begin to look; `changed` is called on a thread of its own."""
        self._changed = changed
        self._thread.start()

    def close(self) -> None:
        """Stop looking."""
        self._thread.close()

    async def _follow(self) -> None:
        from moering.etcd import Etcd, EtcdError

        key, answering = self._cluster.key("leader"), True
        async with Etcd(self._cluster.nodes) as etcd:
            while True:
                try:
                    leader, revision = await etcd.read(key)
                    self._take(leader)
                    answering = True
                    await etcd.wait_for_change(key, revision + 1, LOOK_S)
                except EtcdError as e:
                    if answering:
                        logger.warning("etcd does not answer (%s); staying with the coordinator at hand", e)
                    answering = False
                    await asyncio.sleep(RETRY_S)

    def _take(self, leader: Entry | None) -> None:
        if leader is None:
            return
        try:
            seat = Seat(str(json.loads(leader.value)["address"]), leader.created)
        except (ValueError, TypeError, KeyError):
            logger.warning("the leader's key in etcd holds no address: %r", leader.value[:200])
            return
        if seat != self.seat:
            logger.info("the elected coordinator is at %s", seat.address)
            self.seat = seat
            self._changed()
