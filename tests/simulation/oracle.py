"""What must hold in every run, checked at every event and at the end. Raises `Violation`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from expert_server.residency import Key
from gateway.journal import Event, Failure
from moering.expert_frames import Reply
from moering.protocol import Lease, View
from router.quarantine import POISON_DEATHS
from tests.simulation.arithmetic import reference
from tests.simulation.world import Violation

if TYPE_CHECKING:
    from router.instructions import Dispatch
    from tests.simulation.cluster import Cluster
    from tests.simulation.coordinator import Coordinator
    from tests.simulation.expert_server import ExpertServer
    from tests.simulation.gateway import Gateway
    from tests.simulation.member import Member
    from tests.simulation.router import Router

AFTERMATH_S = 6.0
"""So long after a fault and one lease, what it hit may still be unknown to others."""


def require(condition: bool, text: str) -> None:
    """Raise `Violation` unless `condition`."""
    if not condition:
        raise Violation(text)


@dataclass(slots=True)
class Request:
    """A request as its client sees it."""

    gateway: Gateway
    expected: list[int]
    got: int = 0
    ended: str = ""


@dataclass
class Oracle:
    """Knows what really is, and compares."""

    cluster: Cluster
    requests: dict[str, Request] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    _dispatches: set[tuple[int, int]] = field(default_factory=set)
    _plans: dict[tuple[int, int], bytes] = field(default_factory=dict)
    _hurt_s: dict[Any, float] = field(default_factory=dict)  # when a process, or a holder of an expert, was last hit

    # --- the client's side ---

    def accepted(self, request_id: str, prompt: list[int], max_tokens: int, gateway: Gateway) -> None:
        """A request begins."""
        size = self.cluster.size
        expected = reference(prompt, max_tokens, size.layers, size.experts)
        self.requests[request_id] = Request(gateway, expected)

    def event(self, request_id: str, event: Event) -> None:
        """What the client's stream gets."""
        r = self.requests[request_id]
        require(not r.ended, f"{request_id} goes on after its end ({r.ended}): {event}")
        if isinstance(event, Failure):
            r.ended = event.code
            self.counts[f"failed: {event.code}"] += 1
            poisoned = event.code == "poison" and self.counts["blows"] >= POISON_DEATHS
            require(poisoned, f"{request_id} failed: {event.code} ({event.message})")
            return
        require(r.got < len(r.expected), f"{request_id} got more tokens than it asked for")
        right = r.expected[r.got]
        require(event.token_id == right, f"{request_id} token {r.got} is {event.token_id}, without failures {right}")
        r.got += 1
        self.counts["tokens"] += 1
        require(
            (event.finish_reason is not None) == (r.got == len(r.expected)),
            f"{request_id} ends at the wrong token: {event}",
        )
        r.ended = event.finish_reason or ""

    def cancelled(self, request_id: str) -> None:
        """The client went away."""
        self.requests[request_id].ended = "cancelled"

    # --- routers and servers ---

    def dispatched(self, router: Router, dispatch: Dispatch) -> None:
        """A router sends rows."""
        key = router.incarnation, dispatch.seq
        require(key not in self._dispatches, f"{router.name} uses dispatch id {key} again")
        self._dispatches.add(key)

    def accepted_reply(self, router: Router, incarnation: int, reply: Reply) -> None:
        """A router takes the rows of a reply, on a connection to this incarnation."""
        require(reply.router == router.incarnation, f"{router.name} took a reply for another router: {reply}")
        require(reply.incarnation == incarnation, f"{router.name} took a reply of a dead incarnation: {reply}")

    def hurt(self, process: Any) -> None:
        """Something happened to a process that others may not know yet."""
        now = self.cluster.world.now_s
        self.counts["blows"] += 1
        self._hurt_s[process.name] = now
        if hasattr(process, "residency"):
            for key in process.residency.keys():  # noqa: SIM118 - a method of Residency, not of a dict
                self._hurt_s[key] = now

    def _unhurt(self, what: Any) -> bool:
        """Whether nothing happened to it lately that others may not know."""
        since = self.cluster.world.now_s - self._hurt_s.get(what, float("-inf"))
        return since > self.cluster.rules.lease_s + AFTERMATH_S

    def dropping(self, server: ExpertServer, key: Key) -> None:
        """A server drops a replica because the plan says so."""
        others = [s for s in self.cluster.of_kind("expert-server") if s is not server and key in s.residency.keys()]  # noqa: SIM118
        require(bool(others) or not self._unhurt(key), f"{server.name} drops the last live replica of {key}")
        for router in self.cluster.of_kind("router"):
            roster = self.cluster.processes["coordinator"].membership.roster
            leased = roster.known(router.name, router.incarnation) is not None
            settled = leased and all(self._unhurt(name) for name in (router.name, server.name, "coordinator"))
            # A later plan may count on the replica again: the router then looks for another one (`not_here`).
            followed = router.view is not None and router.applied <= server.applied
            if settled and followed and server.name in router.view.servers:
                index = router.view.servers.index(server.name)
                routed = bool((table(router.view, "routing")[key] == index).any())
                require(not routed, f"{server.name} drops {key}, to which {router.name} still routes")

    # --- membership ---

    def view_applied(self, member: Member, view: View) -> None:
        """A member goes by a view from now on."""
        require((view.term, view.epoch) > member.applied, f"{member.name} goes back to {view.term, view.epoch}")

    def published(self, coordinator: Coordinator, view: View) -> None:
        """The coordinator has a new view for all."""
        self.counts["views"] += 1
        number = view.term, view.epoch
        last = getattr(coordinator, "last_published", (0, 0))
        coordinator.last_published = number  # type: ignore[attr-defined]
        require(number > last, f"the coordinator publishes {number} after {last}")
        if not view.layers:
            return
        content = bytes(view.routing) + bytes(view.target) + "/".join(view.servers).encode()
        require(self._plans.setdefault(number, content) == content, f"two plans have the number {number}")
        routing, target = table(view, "routing"), table(view, "target")
        kept = (routing[..., None] == target[:, :, None, :]).any(axis=3) | (routing < 0)
        require(bool(kept.all()), f"view {number} routes to replicas that are to be dropped")
        placement = coordinator.membership.placement
        for index, server_id in enumerate(view.servers):
            dropped = placement.servers[server_id].held & ~(target == index).any(axis=2)
            require(
                not (dropped & (routing < 0).all(axis=2)).any(), f"view {number} drops last replicas of {server_id}"
            )

    @contextmanager
    def watching(self, coordinator: Coordinator, message: Any) -> Iterator[None]:
        """While the coordinator takes in a message: only a process itself renews its lease."""
        record = None
        if isinstance(message, Lease):
            record = coordinator.membership.roster.records.get(message.server_id)
        if record is None:
            yield
            return
        known = record.alive and record.info.incarnation == message.incarnation
        lease_until_s, state = record.lease_until_s, record.info.state
        yield
        changed = (record.lease_until_s, record.info.state) != (lease_until_s, state)
        require(known or not changed, f"a dead process renewed the lease of {message.server_id}: {message}")

    # --- at the end ---

    def unsettled(self) -> str:
        """What is not yet as it should be long after the last fault; "" when all is well."""
        cluster = self.cluster
        coordinator = cluster.processes["coordinator"].membership
        view: View | None = coordinator.view
        if view is None or not view.layers:
            return "there is no plan"
        size = cluster.size
        survivable = min(size.replication, len(cluster.of_kind("expert-server"))) - 1
        state = view.orphans, view.under_target, view.failures_survivable
        if state[:2] != (0, 0) or state[2] < survivable:
            return f"orphans, experts under target and failures survivable are {state}"
        members = {m.server_id: (m.incarnation, m.state) for m in view.members if m.state != "OFFLINE"}
        members.pop("coordinator")
        alive = {m.name: (m.incarnation, "ONLINE") for m in cluster.members()}
        if members != alive:
            return f"the members are {members}, but alive are {alive}"
        for member in cluster.members():
            record = coordinator.roster.records[member.name]
            if member.applied != (view.term, view.epoch) or record.acknowledged != view.epoch:
                return f"{member.name} goes by {member.applied}, not by {view.term, view.epoch}"
            if member.suspects:
                return f"{member.name} suspects {member.suspects}"
        for server in cluster.of_kind("expert-server"):
            mask = (table(view, "target") == view.servers.index(server.name)).any(axis=2)
            wanted = {(int(layer), int(e)) for layer, e in np.argwhere(mask)}
            if wanted != server.residency.keys():
                return f"{server.name} holds {sorted(server.residency.keys())}, planned are {sorted(wanted)}"
        for request_id, r in self.requests.items():
            if r.gateway.alive and not r.ended:
                return f"{request_id} has {r.got} of {len(r.expected)} tokens"
        for router in cluster.of_kind("router"):
            left = [s for s in cluster.of_kind("expert-server") if router.dispatcher.outstanding_at(s.name)]
            if left or router.engine.sequences:
                return f"{router.name} has {len(router.engine.sequences)} sequences, and dispatches at {left}"
        return ""


def table(view: View, which: str) -> np.ndarray:
    """`routing` or `target`, int16 [layers, experts, width]."""
    return np.frombuffer(getattr(view, which), "<i2").reshape(view.layers, view.experts, view.width)
