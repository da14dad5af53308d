"""The coordinator's decisions, as a state machine without I/O: messages and time go in, actions come out.

`handle` takes what a process sent, `probe_result` the answer to a `Probe`, `tick` the passing of time; the clock is an
argument everywhere. Everything that members see changes in `tick`, which publishes at most one view. The placement of
experts is `moering.placement`, the evidence for a death `moering.records`.

A new coordinator learns all from its members: while the newest view that one of them brings names others who are not
back, and no lease has passed since, it publishes nothing (`Recovery`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moering import records
from moering.admission import STATES, Admission, check_fields, read_view
from moering.errors import HandshakeError, ProtocolError
from moering.placement import Placement, Tables
from moering.popularity import Popularity
from moering.protocol import (
    Held,
    Lease,
    Leave,
    MemberInfo,
    ProvenExit,
    Refused,
    Register,
    Registered,
    Unknown,
    View,
)
from moering.records import Record
from moering.recovery import Recovery

logger = logging.getLogger(__name__)

OWN_PAUSE_S = 1.0
SETTLE_UNKNOWN_S = 2.0
"""Without a number of expert servers to expect: the first plan waits this long after the last one registered."""
REMEMBER_DEAD_S = 60.0
RESEND_S = 2.0
"""A member that has not applied a view after this time gets it again (`zmq.ROUTER` may have dropped it)."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The times and numbers that the coordinator goes by."""

    expert_servers: int = 0  # expected at the start; 0: unknown
    replication: int = 2
    lease_s: float = 10.0
    rejoin_grace_s: float = 5.0
    settle_s: float = 15.0
    allow_inexact: bool = False


@dataclass(frozen=True, slots=True)
class Send:
    """Send `message` to the member with this zmq identity."""

    identity: bytes
    message: Any


@dataclass(frozen=True, slots=True)
class Probe:
    """Ask a server whether it is there, and report with `Membership.probe_result`."""

    server_id: str
    incarnation: int
    address: str


Action = Send | Probe


class Membership:
    """All members, their leases, and what they are told."""

    def __init__(self, rules: Rules, own: MemberInfo, now_s: float) -> None:
        self.rules, self.own = rules, own
        self.records: dict[str, Record] = {}
        self.admission = Admission(rules.allow_inexact)
        self.placement: Placement | None = None
        self.term, self.epoch = 1, 0
        self.view: View | None = None
        self._tables: Tables | None = None
        self._popularity: Popularity | None = None
        self._recovery = Recovery(rules.lease_s)
        self._replan = False
        self._dirty = True  # something happened that members may have to be told
        self._first_server_s = self._last_server_s = 0.0
        self._last_tick_s = now_s
        self._braked: set[str] = set()  # kinds of which none is buried now
        self._doubtful: set[str] = set()  # members of these kinds that look dead
        self._handlers: dict[type, Callable[[bytes, Any, float], list[Action]]] = {
            Register: self._register,
            Lease: self._lease,
            Held: self._held,
            Leave: self._leave,
            ProvenExit: self._proven_exit,
        }

    def handle(self, sender: bytes, message: Any, now_s: float) -> list[Action]:
        """Take in a message. Raises `ProtocolError` for one that no honest member sends; nothing has changed then."""
        handler = self._handlers.get(type(message))
        if handler is None:
            raise ProtocolError(f"a coordinator takes no {message.KIND!r} message")
        self._dirty |= not isinstance(message, Lease)
        return handler(sender, message, now_s)

    # --- messages ---

    def _register(self, sender: bytes, register: Register, now_s: float) -> list[Action]:
        check_fields(register)
        view = None if register.view is None else read_view(register.view)
        info = register.member
        old = self.records.get(info.server_id)
        others = [r.info for r in self.records.values() if r.alive and r is not old]
        try:
            _check_known(old, info)
            self.admission.check(register, others)
        except HandshakeError as e:
            logger.warning("refused %s %s (pid %d): %s", info.kind, info.server_id, info.pid, e)
            return [Send(sender, Refused(str(e), fatal=True))]
        if self.admission.adopt(register, others):
            self.placement = Placement(register.layers, register.experts, self.rules.replication)
            self._popularity = Popularity(register.layers, register.experts)
            logger.info("serving %s: %d layers of %d experts", register.model, register.layers, register.experts)
        held = self._unpack(register.held) if info.kind == "expert-server" else None
        if old is not None and old.alive and old.info.incarnation != info.incarnation:
            self._bury(old, "a new incarnation registered", proven=True, now_s=now_s)
        record = Record(info, sender, now_s + self.rules.lease_s, progress_at_s=now_s)
        record.acknowledged = 0 if view is None else view.epoch
        self.records[info.server_id] = record
        logger.info("%s %s registered (pid %d, %s)", info.kind, info.server_id, info.pid, info.state)
        if info.kind == "expert-server":
            self._server_registered(info, held, now_s)
        self._saw_view(view, now_s)
        self._recovery.back(info.server_id)
        return [Send(sender, Registered(self.term, self.rules.lease_s))]

    def _server_registered(self, info: MemberInfo, held: Any, now_s: float) -> None:
        assert self.placement is not None  # an expert server without a model was refused
        self.placement.put(info.server_id, info.zone, info.capacity, info.state, held)
        for router in self.records.values():
            router.suspects.pop(info.server_id, None)
        self._replan = True
        self._last_server_s = now_s
        self._first_server_s = self._first_server_s or now_s

    def _saw_view(self, view: View | None, now_s: float) -> None:
        """A member has a view of another coordinator: go on from it, or at least above it."""
        if view is None:
            return
        below = (view.term, view.epoch) <= (self.term, self.epoch)
        if below and self.view is not None and not self._recovery.active:
            return
        planned = self.placement is not None and self.placement.plan is not None
        if not planned and view.layers:
            self._recovery.start(view, [i for i, r in self.records.items() if r.alive], now_s)
        self.term, self.epoch = max(self.term, view.term + 1), max(self.epoch, view.epoch)
        self._tables = None

    def _lease(self, sender: bytes, lease: Lease, now_s: float) -> list[Action]:
        record = self._known(lease.server_id, lease.incarnation)
        if lease.state not in STATES:
            raise ProtocolError(f"lease: state {lease.state!r:.40} is not one of {', '.join(STATES)}")
        if record is None:
            return [Send(sender, Unknown(self.term))]
        was, acknowledged = record.info.state, record.acknowledged
        record.renew(sender, lease, self.rules.lease_s, now_s)
        self._dirty |= acknowledged != lease.epoch
        if was != lease.state:
            self._state_changed(record, was)
        if lease.loads and self._popularity is not None:
            self._popularity.add(lease.loads, now_s)
        behind = self.view is not None and (lease.term, lease.epoch) < (self.view.term, self.view.epoch)
        if behind and now_s - record.view_sent_s >= RESEND_S:
            record.view_sent_s = now_s
            return [Send(sender, self.view)]
        return []

    def _state_changed(self, record: Record, was: str) -> None:
        info = record.info
        self._dirty = True
        logger.info("%s %s: %s → %s", info.kind, info.server_id, was, info.state)
        if info.kind == "expert-server" and self.placement is not None:
            self.placement.put(info.server_id, info.zone, info.capacity, info.state, None)
            self._replan |= "DRAINING" in (was, info.state)

    def _held(self, sender: bytes, message: Held, now_s: float) -> list[Action]:
        record = self._known(message.server_id, message.incarnation)
        if record is None:
            return [Send(sender, Unknown(self.term))]
        if record.info.kind != "expert-server" or self.placement is None:
            raise ProtocolError(f"held: from a {record.info.kind}")
        held = self._unpack(message.held)
        if len(message.digests) != 8 * int(held.sum()):
            raise ProtocolError(f"held: {len(message.digests)} bytes of digests for {int(held.sum())} experts")
        differing = self.placement.differing(held, message.digests)
        if differing is not None:
            reason = "layer {} expert {} has other bytes than the replica seen first".format(*differing)
            self._bury(record, f"refused: {reason}", proven=False, now_s=now_s)
            return [Send(sender, Refused(f"{message.server_id}: {reason}", fatal=True))]
        record.info = replace(record.info, experts=int(held.sum()))
        self.placement.hold(message.server_id, held)
        return []

    def _unpack(self, held: bytes) -> Any:
        pairs = None if self.placement is None else self.placement.unpack(held)
        if pairs is None:
            raise ProtocolError("held: not a sorted list of experts of this model")
        return pairs

    def _leave(self, sender: bytes, leave: Leave, now_s: float) -> list[Action]:
        record = self._known(leave.server_id, leave.incarnation)
        if record is not None:
            self._bury(record, "it left", proven=True, now_s=now_s)
        return []

    def _proven_exit(self, sender: bytes, proof: ProvenExit, now_s: float) -> list[Action]:
        record = self.records.get(proof.server_id)
        if record is not None and record.alive and record.info.pid == proof.pid:  # else: of an older incarnation
            self._bury(record, f"it exited with {proof.exit_code}", proven=True, now_s=now_s)
        self._recovery.proven_exit(proof.server_id, proof.pid, now_s)
        return []

    def probe_result(self, server_id: str, incarnation: int, answer: str, now_s: float) -> list[Action]:
        """`answer` to a `Probe`: "answered", "refused" (nobody listens: a proof) or "silent" (agrees with a router)."""
        record = self._known(server_id, incarnation)
        if record is not None and answer == "refused":
            self._bury(record, "its address refuses connections", proven=True, now_s=now_s)
        elif record is not None:
            record.silent = answer == "silent"
        return []

    def _known(self, server_id: str, incarnation: int) -> Record | None:
        record = self.records.get(server_id)
        return record if record is not None and record.alive and record.info.incarnation == incarnation else None

    def _bury(self, record: Record, reason: str, *, proven: bool, now_s: float) -> None:
        """`record` is dead. The share of an expert server that may come back is kept for it, for a while."""
        info, self._dirty = record.info, True
        record.info, record.died_s = replace(info, state="OFFLINE", experts=0), now_s
        grace = proven and info.kind == "expert-server" and self.rules.rejoin_grace_s > 0
        decision = f"its share waits {self.rules.rejoin_grace_s:g} s for it" if grace else "going on without it"
        logger.warning("%s %s (pid %d) is OFFLINE: %s; %s", info.kind, info.server_id, info.pid, reason, decision)
        if info.kind == "expert-server" and self.placement is not None:
            record.grace_until_s = now_s + self.rules.rejoin_grace_s if grace else None
            self.placement.lose(info.server_id, keep_share=grace)
            self._replan |= not grace

    # --- time ---

    def tick(self, now_s: float) -> list[Action]:
        """Let time pass: bury, plan, and publish what changed. Call it every 50 to 100 ms."""
        pause = now_s - self._last_tick_s
        self._last_tick_s = now_s
        if pause > OWN_PAUSE_S:
            logger.warning("this coordinator stood still for %.1f s; all leases are extended by it", pause)
            self._recovery.shift(pause)
            for record in self.records.values():
                record.shift(pause)
        if self._recovery.active:
            if not self._recovery.done(now_s):
                return []
            self._recover(now_s)
        probes = self._judge(now_s)
        self._forget(now_s)
        waiting = self.placement is not None and self.placement.plan is None
        if not self._dirty and not waiting:
            return probes
        self._dirty = False
        self._plan(now_s)
        return [*probes, *self._publish(now_s)]

    def _judge(self, now_s: float) -> list[Action]:
        """Bury those who look dead, unless so many do that it is more likely this process that is cut off."""
        evidence = records.examine(self.records.values(), now_s)
        dead = [self.records[i] for i in evidence.dead]
        braked = records.braked(dead, self.records.values())
        for kind in braked - self._braked:
            logger.warning("%d of kind %s look dead at once, without proof; forgetting none", len(dead), kind)
        self._braked = braked
        doubtful = {r.info.server_id for r in dead if r.info.kind in braked}
        self._dirty |= doubtful != self._doubtful
        self._doubtful = doubtful
        for record in dead:
            if record.info.kind not in braked:
                self._bury(record, evidence.dead[record.info.server_id], proven=False, now_s=now_s)
        for record in evidence.probe:
            record.probed_s = now_s
        return [Probe(r.info.server_id, r.info.incarnation, r.info.address) for r in evidence.probe]

    def _forget(self, now_s: float) -> None:
        """End the grace of those who did not come back, and forget the long dead."""
        for server_id, record in list(self.records.items()):
            if not record.alive and record.grace_until_s is not None and now_s >= record.grace_until_s:
                record.grace_until_s = None
                logger.info("%s did not come back; planning without it", server_id)
                if self.placement is not None:
                    self.placement.lose(server_id, keep_share=False)
                self._replan = self._dirty = True
            if not record.alive and now_s - record.died_s >= REMEMBER_DEAD_S:
                del self.records[server_id]
                self._dirty = True

    def _plan(self, now_s: float) -> None:
        if self.placement is None or (self.placement.plan is None and not self._settled(now_s)):
            return
        assert self._popularity is not None
        self.placement.popularity = self._popularity.tokens(now_s)
        if self._replan or self.placement.plan is None:
            self._replan = False
            self.placement.replan()
        self.placement.assign_orphans(self._doubtful)

    def _settled(self, now_s: float) -> bool:
        """Whether enough expert servers are here for the first plan."""
        present = sum(r.alive and r.info.kind == "expert-server" for r in self.records.values())
        if self.rules.expert_servers:
            late = now_s - self._first_server_s >= self.rules.settle_s
            return present >= self.rules.expert_servers or (present > 0 and late)
        return present > 0 and now_s - self._last_server_s >= SETTLE_UNKNOWN_S

    def _recover(self, now_s: float) -> None:
        """Go on from the newest view that members brought; those of it who are not back are dead."""
        view, absent = self._recovery.finish()
        if self.placement is None or (view.layers, view.experts) != (self.placement.layers, self.placement.experts):
            logger.warning("the members' last view is of another model; planning anew")
            return
        for info, proven_s in absent:
            logger.warning("%s %s of the last view is not back; going on without it", info.kind, info.server_id)
            record = Record(replace(info, state="OFFLINE", experts=0), b"", 0.0, died_s=now_s)
            self.records.setdefault(info.server_id, record)
            if info.kind == "expert-server" and proven_s is not None:
                record.grace_until_s = proven_s + self.rules.rejoin_grace_s
                self.placement.put(info.server_id, info.zone, info.capacity, "JOINING", None)
                self.placement.lose(info.server_id, keep_share=True)
        self.placement.restore(view)
        self._replan = self._dirty = True
        logger.info("took over at epoch %d of term %d with %d members", view.epoch, view.term, len(self.records))

    def _publish(self, now_s: float) -> list[Action]:
        routers = [r.acknowledged for r in self.records.values() if r.alive and r.info.kind == "router"]
        tables = None
        if self.placement is not None and self.placement.plan is not None:
            tables = self.placement.tables(min(routers, default=None))
        members = [self.own, *(r.info for _, r in sorted(self.records.items()))]
        unchanged = tables is None if self._tables is None else tables is not None and tables.same_as(self._tables)
        if self.view is not None and unchanged and members == self.view.members and self.view.term == self.term:
            return []
        self.epoch += 1
        self.view = self._view(members, tables)
        self._tables = tables
        if tables is not None and self.placement is not None:
            self.placement.published(tables, self.epoch)
        logger.info(
            "epoch %d: %d members, %d orphans, %d experts under %d replicas, %d failures survivable",
            self.epoch, sum(m.state != "OFFLINE" for m in members), self.view.orphans, self.view.under_target,
            self.rules.replication, self.view.failures_survivable,
        )  # fmt: skip
        alive = [r for r in self.records.values() if r.alive]
        for record in alive:
            record.view_sent_s = now_s
        return [Send(r.identity, self.view) for r in alive]

    def _view(self, members: Sequence[MemberInfo], tables: Tables | None) -> View:
        if tables is None:
            return View(self.term, self.epoch, list(members), [], 0, 0, 0, b"", b"", self.rules.replication, -1, 0, 0)
        layers, experts, width = tables.routing.shape
        return View(
            self.term, self.epoch, list(members), list(tables.servers), layers, experts, width,
            tables.routing.astype("<i2").tobytes(), tables.target.astype("<i2").tobytes(), self.rules.replication,
            tables.failures_survivable, tables.orphans, tables.under_target,
        )  # fmt: skip


def _check_known(old: Record | None, info: MemberInfo) -> None:
    if old is None or not old.alive:
        return
    if old.info.kind != info.kind:
        raise HandshakeError(f"the id {info.server_id} belongs to a {old.info.kind}, not a {info.kind}")
    if old.info.incarnation > info.incarnation:
        raise HandshakeError(f"incarnation {old.info.incarnation} of {info.server_id}, a newer one, is registered")
