"""The coordinator's decisions, as a state machine without I/O: messages and time go in, actions come out.

`handle` takes what a process sent, `probe_result` the answer to a `Probe`, `tick` the passing of time; the clock is an
argument everywhere. Everything that members see changes in `tick`, which publishes at most one view. The placement of
experts is `moering.placement`, the list of members `moering.roster`, the evidence for a death `moering.records`.

A new coordinator learns all from its members: while the newest view that one of them brings names others who are not
back, and no lease has passed since, it publishes nothing (`Recovery`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from moering.actions import Action, Rules, Send
from moering.admission import STATES, Admission, check_fields, read_view
from moering.drain import told_to_drain
from moering.drift import Drift
from moering.errors import HandshakeError, ProtocolError
from moering.first_plan import FirstPlan
from moering.operations.book import Operations
from moering.operations.cluster import ClusterFacts
from moering.placement import Placement
from moering.popularity import Popularity
from moering.protocol import (
    Held,
    Lease,
    Leave,
    MemberInfo,
    Operate,
    ProvenExit,
    Refused,
    Register,
    Registered,
    Unknown,
    View,
)
from moering.records import Record
from moering.recovery import Recovery
from moering.roster import Roster
from moering.tables import Tables, make_view
from moering.timeline import Timeline
from moering.view_log import ViewLog

logger = logging.getLogger(__name__)

RESEND_S = 2.0
"""A member that has not applied a view after this time gets it again (`zmq.ROUTER` may have dropped it)."""


class Membership:
    """All members, their leases, and what they are told."""

    def __init__(self, rules: Rules, own: MemberInfo, now_s: float, term: int = 1, epoch_s: float = 0.0) -> None:
        """`epoch_s`: what has to be added to the clock's seconds to make them seconds since 1970."""
        self.rules, self.own, self._epoch_s = rules, own, epoch_s
        self.operations = Operations()
        self.timeline = Timeline()
        self._log = ViewLog()
        self.roster = Roster(rules, now_s)
        self.admission = Admission(rules.allow_inexact)
        self.placement: Placement | None = None
        self.term, self.epoch = term, 0
        self.view: View | None = None
        self._tables: Tables | None = None
        self._popularity: Popularity | None = None
        self._drift = Drift(rules.rebalance_s, now_s)
        self._recovery = Recovery(rules.lease_s)
        self._replan = False
        self._dirty = True  # something happened that members may have to be told
        self._first_plan = FirstPlan(rules, now_s)
        self._doubtful: set[str] = set()
        self._handlers: dict[type, Callable[[bytes, Any, float], list[Action]]] = {
            Register: self._register,
            Lease: self._lease,
            Held: self._held,
            Leave: self._leave,
            ProvenExit: self._proven_exit,
            Operate: self._operate,
        }

    def handle(self, sender: bytes, message: Any, now_s: float) -> list[Action]:
        """Take in a message. Raises `ProtocolError` for one that no honest member sends; nothing has changed then."""
        handler = self._handlers.get(type(message))
        if handler is None:
            raise ProtocolError(f"a coordinator takes no {message.KIND!r} message")
        self._dirty |= not isinstance(message, Lease)
        return handler(sender, message, now_s)

    def succeed(self, view: View, now_s: float) -> None:
        """Go on from the last view of another coordinator, as if a member had brought it. For a new one only."""
        if view.replication != self.rules.replication:
            logger.warning("the last view has %d replicas of each expert, this coordinator's --replication is %d",
                           view.replication, self.rules.replication)  # fmt: skip
        self._saw_view(view, now_s)

    # --- messages ---

    def _register(self, sender: bytes, register: Register, now_s: float) -> list[Action]:
        check_fields(register)
        view = None if register.view is None else read_view(register.view)
        info = register.member
        old = next((r for r in self.roster.alive() if r.info.server_id == info.server_id), None)
        others = [r.info for r in self.roster.alive() if r is not old]
        try:
            self.admission.check(register, None if old is None else old.info, others)
        except HandshakeError as e:
            logger.warning("refused %s %s (pid %d): %s", info.kind, info.server_id, info.pid, e)
            return [Send(sender, Refused(str(e), fatal=True))]
        if self.admission.adopt(register, others):
            self.placement = Placement(register.layers, register.experts, self.rules.replication)
            self._popularity = Popularity(register.layers, register.experts)
            logger.debug("serving %s: %d layers of %d experts", register.model, register.layers, register.experts)
        held = self._unpack(register.held) if info.kind == "expert-server" else None
        if old is not None and old.info.incarnation != info.incarnation:
            self._bury(old, "a new incarnation registered", proven=True, now_s=now_s)
        self.roster.records[info.server_id] = Record(
            info, sender, now_s + self.rules.lease_s, progress_at_s=now_s, expert_bytes=register.expert_bytes,
            view_sent_s=now_s,  # the view of before does not name it; the next one is on its way
        )  # fmt: skip
        logger.debug("%s %s registered (pid %d, %s)", info.kind, info.server_id, info.pid, info.state)
        self._event("member.registered", info.server_id, f"pid {info.pid}, {info.state}", now_s)
        if info.kind == "expert-server":
            self._server_registered(info, held, now_s)
        self._saw_view(view, now_s)
        self._recovery.back(info.server_id)
        return [Send(sender, Registered(self.term, self.rules.lease_s))]

    def _server_registered(self, info: MemberInfo, held: Any, now_s: float) -> None:
        assert self.placement is not None  # an expert server without a model was refused
        self.placement.put(info.server_id, info.zone, info.capacity, info.state, held)
        for router in self.roster.alive("router"):
            router.suspects.pop(info.server_id, None)
            router.wedged.pop(info.server_id, None)
        self._replan = True
        self._first_plan.server_registered(now_s)

    def _saw_view(self, view: View | None, now_s: float) -> None:
        """A member has a view of another coordinator: go on from it, or at least above it."""
        if view is None:
            return
        below = (view.term, view.epoch) <= (self.term, self.epoch)
        if below and self.view is not None and not self._recovery.active:
            return
        planned = self.placement is not None and self.placement.plan is not None
        if not planned and view.layers:
            self._recovery.start(view, [r.info.server_id for r in self.roster.alive()], now_s)
        self.operations.restore(view)
        self.timeline.took_over(view.operations)
        self.term, self.epoch = max(self.term, view.term + 1), max(self.epoch, view.epoch)
        self._tables = None

    def _lease(self, sender: bytes, lease: Lease, now_s: float) -> list[Action]:
        record = self.roster.known(lease.server_id, lease.incarnation)
        if lease.state not in STATES:
            raise ProtocolError(f"lease: state {lease.state!r:.40} is not one of {', '.join(STATES)}")
        if record is None:
            return [Send(sender, Unknown(self.term))]
        if lease.loads and self._popularity is not None:
            self._popularity.add(lease.loads, now_s)
        if sender != record.identity:  # over another connection: what was sent last over the old one may be lost
            return [Send(sender, Unknown(self.term))]
        was, acknowledged, suspected = record.info.state, record.acknowledged, set(record.suspects)
        record.renew(sender, lease, self.rules.lease_s, now_s)
        self._dirty |= acknowledged != lease.epoch
        if was != lease.state:
            self._state_changed(record, was, now_s)
        for server_id in suspected ^ set(record.suspects):
            around = server_id in record.suspects
            text = f"{lease.server_id} routes {'around it' if around else 'to it again'}"
            self._event("failure.suspected" if around else "failure.over", server_id, text, now_s)
        behind = self.view is not None and (lease.term, lease.epoch) < (self.view.term, self.view.epoch)
        if behind and now_s - record.view_sent_s >= RESEND_S:
            record.view_sent_s = now_s
            return [Send(sender, self.view)]
        return []

    def _state_changed(self, record: Record, was: str, now_s: float) -> None:
        info = record.info
        self._dirty = True
        self._event(f"member.{info.state.lower()}", info.server_id, f"was {was}", now_s)
        logger.debug("%s %s: %s → %s", info.kind, info.server_id, was, info.state)
        if info.kind == "expert-server" and self.placement is not None:
            self.placement.put(info.server_id, info.zone, info.capacity, info.state, None)
            self._replan |= "DRAINING" in (was, info.state)

    def _held(self, sender: bytes, message: Held, now_s: float) -> list[Action]:
        record = self.roster.known(message.server_id, message.incarnation)
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
        new = self.placement.hold(message.server_id, held)
        self.operations.loaded(new * record.expert_bytes)
        return []

    def _unpack(self, held: bytes) -> Any:
        pairs = None if self.placement is None else self.placement.unpack(held)
        if pairs is None:
            raise ProtocolError("held: not a sorted list of experts of this model")
        return pairs

    def _leave(self, sender: bytes, leave: Leave, now_s: float) -> list[Action]:
        record = self.roster.known(leave.server_id, leave.incarnation)
        if record is not None:
            self._bury(record, "it left", proven=True, now_s=now_s)
        return []

    def _proven_exit(self, sender: bytes, proof: ProvenExit, now_s: float) -> list[Action]:
        record = self.roster.records.get(proof.server_id)
        self.operations.died(proof.server_id)
        if record is not None and record.alive and record.info.pid == proof.pid:  # else: an older incarnation's
            self._bury(record, f"it exited with {proof.exit_code}", proven=True, now_s=now_s)
        self._recovery.proven_exit(proof.server_id, proof.pid, now_s)
        return []

    def _operate(self, sender: bytes, ask: Operate, now_s: float) -> list[Action]:
        answer = self.operations.ask(ask, self._facts(), now_s + self._epoch_s)
        if answer.code != "accepted":
            self._event(
                "operation.refused", ask.id, f"{ask.action} {ask.target or ask.process_kind}: {answer.reason}", now_s
            )
        return [Send(sender, answer)]

    def _facts(self) -> ClusterFacts:
        survivable = -1 if self.view is None else self.view.failures_survivable
        return ClusterFacts(self.own, self.roster, self.placement, survivable, self.operations.deaths)

    def probe_result(self, server_id: str, incarnation: int, answer: str, now_s: float) -> list[Action]:
        """`answer` to a `Probe`: "answered", "refused" (nobody listens: a proof) or "silent" (agrees with a router)."""
        record = self.roster.known(server_id, incarnation)
        if record is not None and answer == "refused":
            self._bury(record, "its address refuses connections", proven=True, now_s=now_s)
        elif record is not None:
            record.silent = answer == "silent"
        return []

    def _bury(self, record: Record, reason: str, *, proven: bool, now_s: float) -> None:
        keep_share = self.roster.bury(record, reason, proven=proven, now_s=now_s)
        self._event("member.offline", record.info.server_id, reason, now_s)
        self._dirty = True
        if record.info.kind == "expert-server" and self.placement is not None:
            self.placement.lose(record.info.server_id, keep_share=keep_share)
            self._replan |= not keep_share

    @property
    def told_to_leave(self) -> bool:
        """Whether an operation wants this coordinator to make room for the next one, and members know of it."""
        return self.view is not None and told_to_drain(self.view, self.own)

    # --- time ---

    def tick(self, now_s: float) -> list[Action]:
        """Let time pass: bury, plan, and publish what changed. Call it every 50 to 100 ms."""
        self._recovery.shift(self.roster.own_pause(now_s))
        if self._recovery.active:
            if not self._recovery.done(now_s):
                return []
            self._recover(now_s)
        verdict = self.roster.judge(now_s)
        for record, reason in verdict.dead:
            self._bury(record, reason, proven=False, now_s=now_s)
        for server_id in self.roster.grace_ended(now_s):
            self._replan = self._dirty = True
            if self.placement is not None:
                self.placement.lose(server_id, keep_share=False)
        self._dirty |= self.roster.forget(now_s) or verdict.doubtful != self._doubtful
        self._doubtful = verdict.doubtful
        self._level(now_s)
        actions: list[Action] = [*verdict.probes]
        waiting = self.placement is not None and self.placement.plan is None
        if self._dirty or waiting:
            self._plan(now_s)
            actions += self._publish(now_s)
        # After publishing: operations go by what is true now. What they decide is published at the next tick.
        self.operations.advance(self._facts(), now_s + self._epoch_s)
        self._dirty = self.operations.unpublished
        return actions

    def _plan(self, now_s: float) -> None:
        if self.placement is None:
            return
        if self.placement.plan is None and not self._first_plan.due(
            len(list(self.roster.alive("expert-server"))), now_s
        ):
            return
        self._measure(now_s)
        if self._replan or self.placement.plan is None:
            self._replan = False
            self.placement.replan()
        self.placement.doubtful = self._doubtful
        self.placement.assign_orphans()

    def _measure(self, now_s: float) -> None:
        if self.placement is not None and self._popularity is not None:
            self.placement.popularity = self._popularity.tokens(now_s)
            self.placement.popularity_known = self._popularity.known(now_s)

    def _level(self, now_s: float) -> None:
        """Follow the popularity of experts, while nothing else changes."""
        if self._replan or not self._drift.due(now_s):
            return
        self._measure(now_s)
        levelled = self._drift.follow(self.placement, self._doubtful, now_s)
        if levelled is not None:
            self._dirty = True
            self._event("plan.levelled", "", levelled, now_s)

    def _recover(self, now_s: float) -> None:
        """Go on from the newest view that members brought; those of it who are not back are dead."""
        view, absent = self._recovery.finish()
        if self.placement is None or (view.layers, view.experts) != (self.placement.layers, self.placement.experts):
            logger.warning("the members' last view is of another model; planning anew")
            return
        for info, exited_s in absent:
            record = self.roster.records[info.server_id] = Record(info, b"", now_s)
            proven = exited_s is not None
            if info.kind == "expert-server":
                self.placement.put(info.server_id, info.zone, info.capacity, info.state, None)
            self._bury(record, "it exited" if proven else "it is not back", proven=proven, now_s=exited_s or now_s)
        self.placement.restore(view)
        self._replan = self._dirty = True
        self._event("coordinator.took_over", self.own.server_id, f"at epoch {view.epoch}", now_s)
        logger.info(
            "took over at epoch %d of term %d with %d members", view.epoch, view.term, len(list(self.roster.alive()))
        )

    def _publish(self, now_s: float) -> list[Action]:
        tables = None
        if self.placement is not None and self.placement.plan is not None:
            acknowledged = min((r.acknowledged for r in self.roster.alive("router")), default=None)
            tables = self.placement.tables(acknowledged)
        members = [self.own, *self.roster.infos()]
        unchanged = tables is None if self._tables is None else tables is not None and tables.same_as(self._tables)
        unchanged = unchanged and not self.operations.unpublished
        if self.view is not None and unchanged and members == self.view.members and self.view.term == self.term:
            return []
        self.epoch += 1
        before, operations = self.view, self.operations.to_publish(self.epoch)
        self.view = make_view(self.term, self.epoch, members, tables, self.rules.replication, operations)
        self._tables = tables
        self.timeline.published(before, self.view, now_s + self._epoch_s)
        if tables is not None and self.placement is not None:
            self.placement.published(tables, self.epoch)
        self._log.published(self.view, now_s)
        for record in self.roster.alive():
            record.view_sent_s = now_s
        return [Send(r.identity, self.view) for r in self.roster.alive()]

    def _event(self, type: str, subject: str, text: str, now_s: float) -> None:
        self.timeline.add(type, subject, text, at=now_s + self._epoch_s, epoch=self.epoch)
