"""What the coordinator remembers of each process, and the evidence for its death. Pure: `now_s` is an argument."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from moering.protocol import Lease, MemberInfo

SUSPECTED_S = 3.0
"""A majority of routers must have suspected a server for this long."""
LATE_S = 2.5
"""A member that did not renew for so long has missed two renewals."""
BRAKE_COUNT, BRAKE_SHARE = 3, 0.3
"""At least so many, and more than this share, looking dead without proof: rather we are cut off than they are dead."""


@dataclass(slots=True, eq=False)
class Record:
    """One process. `info.state` is OFFLINE once it is dead; a dead one is kept for a while, for the status."""

    info: MemberInfo
    identity: bytes
    lease_until_s: float
    acknowledged: int = 0  # epoch of the newest view that its main loop applied
    suspects: dict[str, float] = field(default_factory=dict)  # a router's: server id → suspected since
    wedged: dict[str, float] = field(default_factory=dict)  # a router's: the same for those that answer nothing
    progress: int = 0
    progress_at_s: float = 0.0
    queued: int = 0
    view_sent_s: float = 0.0
    died_s: float = 0.0
    grace_until_s: float | None = None
    probed_s: float = float("-inf")
    silent: bool = False  # the coordinator's own probe got no answer
    expert_bytes: int = 0  # of one expert

    @property
    def alive(self) -> bool:
        """Whether it is a member."""
        return self.info.state != "OFFLINE"

    def renew(self, identity: bytes, lease: Lease, lease_s: float, now_s: float) -> None:
        """Take in a renewal of the lease."""
        self.identity, self.lease_until_s = identity, now_s + lease_s
        self.acknowledged = lease.epoch
        self.suspects = {s: self.suspects.get(s, now_s) for s in lease.suspects}
        self.wedged = {s: self.wedged.get(s, now_s) for s in lease.wedged}
        if lease.progress != self.progress or not lease.queued:
            self.progress, self.progress_at_s = lease.progress, now_s
        self.queued = lease.queued
        self.info = replace(self.info, state=lease.state)

    def stalled(self, now_s: float) -> bool:
        """Work is queued and its main loop has not turned for a while."""
        return self.queued > 0 and now_s - self.progress_at_s >= SUSPECTED_S

    def shift(self, by_s: float) -> None:
        """The coordinator itself was stopped for so long: nothing that lapsed meanwhile is anybody's fault."""
        self.lease_until_s += by_s
        self.progress_at_s += by_s
        self.probed_s += by_s
        self.suspects = {s: since + by_s for s, since in self.suspects.items()}
        self.wedged = {s: since + by_s for s, since in self.wedged.items()}
        if self.grace_until_s is not None:
            self.grace_until_s += by_s


@dataclass(frozen=True, slots=True)
class Evidence:
    """Who looks dead without proof, with the reason; and whom the coordinator should ask itself.

    `late` are those on the way there. They count for the brake: when a coordinator is cut off, leases lapse one after
    the other, not all in one moment.
    """

    dead: Mapping[str, str]
    late: tuple[Record, ...]
    probe: tuple[Record, ...]


def examine(records: Iterable[Record], lease_s: float, now_s: float) -> Evidence:
    """Judge all members by their leases, of `lease_s` each, and by the routers' suspicions.

    A server that routers reach and get no answer from is dead only if its own lease says that its loop stands still:
    one that is slow may be passed over by routers, but is never evicted.
    """
    alive = [r for r in records if r.alive]
    dead = {r.info.server_id: "its lease lapsed" for r in alive if r.lease_until_s < now_s}
    late = [r for r in alive if r.lease_until_s - lease_s < now_s - LATE_S]
    routers = [r for r in alive if r.info.kind == "router" and r.info.server_id not in dead]
    probe = []
    for record in alive:
        server_id = record.info.server_id
        if record.info.kind != "expert-server" or server_id in dead:
            continue
        if 2 * sum(server_id in r.suspects for r in routers) > len(routers):
            late.append(record)
        votes = sum(now_s - r.suspects.get(server_id, now_s) >= SUSPECTED_S for r in routers)
        since = [min(r.suspects.get(server_id, now_s), r.wedged.get(server_id, now_s)) for r in routers]
        unanswered = sum(now_s - s >= SUSPECTED_S for s in since)
        if 2 * unanswered > len(routers) and record.stalled(now_s):
            dead[server_id] = f"{unanswered} of {len(routers)} routers get no answer, and its loop stands still"
        elif 2 * votes <= len(routers) or not votes:
            record.silent = False
        elif len(routers) > 1 or record.silent or record.stalled(now_s):
            dead[server_id] = f"{votes} of {len(routers)} routers suspect it"
        elif now_s - record.probed_s >= SUSPECTED_S:
            probe.append(record)
    gone = {r.info.server_id: r for r in late if r.info.server_id not in dead}
    return Evidence(dead, tuple(gone.values()), tuple(probe))


def braked(gone_or_late: Iterable[Record], records: Iterable[Record]) -> set[str]:
    """The kinds of which too many look dead at once to believe it; all kinds where it is too many of all processes."""
    gone = Counter(r.info.kind for r in gone_or_late)
    all_ = Counter(r.info.kind for r in records if r.alive)
    if _too_many(gone.total(), all_.total()):
        return set(gone)
    return {kind for kind, count in gone.items() if _too_many(count, all_[kind])}


def _too_many(gone: int, all_: int) -> bool:
    return gone >= BRAKE_COUNT and gone > BRAKE_SHARE * all_
