"""A cluster without processes, for the tests of the coordinator: honest members, on a clock of ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from moering import protocol
from moering.actions import Action, Probe, Rules, Send
from moering.membership import Membership
from moering.protocol import Held, Lease, Leave, MemberInfo, ProvenExit, Refused, Register, Unknown, View

LAYERS, EXPERTS = 2, 4
ALL = {(layer, e) for layer in range(LAYERS) for e in range(EXPERTS)}
OWN = MemberInfo("coordinator", "coordinator", 1, "tcp://127.0.0.1:1", 1, "ONLINE", "", 0, 0)


def pack(pairs: set[tuple[int, int]]) -> bytes:
    return np.array(sorted(layer << 16 | expert for layer, expert in pairs), "<u4").tobytes()


def digests(pairs: set[tuple[int, int]]) -> bytes:
    return np.array([layer * 1000 + expert + 1 for layer, expert in sorted(pairs)], "<u8").tobytes()


def table(view: View, which: str) -> list[list[list[str]]]:
    """`routing` or `target` as server ids per layer and expert."""
    rows = np.frombuffer(getattr(view, which), "<i2").reshape(view.layers, view.experts, view.width)
    return [[[view.servers[s] for s in row if s >= 0] for row in layer] for layer in rows.tolist()]


def of(view: View, which: str, server_id: str) -> set[tuple[int, int]]:
    """The (layer, expert) pairs where a server stands in a table."""
    return {
        (layer, e) for layer, rows in enumerate(table(view, which)) for e, row in enumerate(rows) if server_id in row
    }


def holders(view: View, which: str = "routing") -> list[set[str]]:
    """The servers of each expert, layer by layer."""
    return [set(row) for rows in table(view, which) for row in rows]


@dataclass
class Member:
    """One process. `loading` False: it takes note of views and loads nothing until told to."""

    kind: str
    server_id: str
    incarnation: int = 1
    capacity: int = 8
    zone: str = ""
    state: str = "ONLINE"
    digest: str = "d"
    fingerprint: str = "f"
    view: View | None = None
    held: set[tuple[int, int]] = field(default_factory=set)
    suspects: list[str] = field(default_factory=list)
    wedged: list[str] = field(default_factory=list)
    progress: int = 0
    queued: int = 0
    registered: bool = False
    refused: str = ""
    loading: bool = True
    acknowledging: bool = True
    acknowledged: tuple[int, int] = (0, 0)
    silent: bool = False
    address: str = "tcp://127.0.0.1:9"
    connection: int = 1

    @property
    def identity(self) -> bytes:
        return f"{self.server_id}.{self.incarnation}.{self.connection}".encode()

    @property
    def pid(self) -> int:
        return self.incarnation * 100

    def register(self) -> Register:
        shape = (0, 0) if self.kind == "gateway" else (LAYERS, EXPERTS)
        server = self.kind == "expert-server"
        info = MemberInfo(
            self.kind, self.server_id, self.incarnation, self.address, self.pid, self.state, self.zone,
            self.capacity if server else 0, len(self.held),
        )  # fmt: skip
        view = None if self.view is None else protocol.encode(self.view)
        fingerprint = "" if self.kind == "gateway" else self.fingerprint
        return Register(
            info, "m", "" if self.kind == "gateway" else self.digest, *shape, fingerprint, pack(self.held), view
        )

    def lease(self) -> Lease:
        return Lease(
            self.server_id, self.incarnation, self.state, self.progress, self.queued, self.suspects,
            *self.acknowledged, b"", self.wedged,
        )  # fmt: skip

    def report(self) -> Held:
        return Held(self.server_id, self.incarnation, pack(self.held), digests(self.held))

    def take(self, message: object) -> list[object]:
        """Act on a message; what the member sends back."""
        if isinstance(message, Refused):
            self.refused, self.silent = message.reason, message.fatal
        elif isinstance(message, Unknown):
            self.registered = False
        elif isinstance(message, View):
            if self.view is not None and (message.term, message.epoch) <= (self.view.term, self.view.epoch):
                return []
            self.view = message
            if self.acknowledging:
                self.acknowledged = (message.term, message.epoch)
            if self.kind == "expert-server" and self.loading:
                return self.follow()
        return []

    def follow(self) -> list[object]:
        """Hold exactly what the target says; a joining server is ONLINE then."""
        assert self.view is not None
        if self.server_id not in self.view.servers:
            return []
        wanted = of(self.view, "target", self.server_id)
        if wanted == self.held and self.state != "JOINING":
            return []
        self.held = wanted
        self.state = "ONLINE" if self.state == "JOINING" else self.state
        return [self.report(), self.lease()]


class Cluster:
    """Members around one `Membership`. Time moves in steps of 0.1 s, leases are renewed every second."""

    def __init__(self, *members: Member, **rules: float) -> None:
        self.now_s = 100.0
        self.stagger_s = 0.0  # between the renewals of one member and those of the next
        self.rules = Rules(**{"expert_servers": 0, **rules})  # type: ignore[arg-type]
        self.members = {m.server_id: m for m in members}
        self.probes: list[Probe] = []
        self.published: list[View] = []
        self.start_coordinator()

    def start_coordinator(self) -> None:
        self.coordinator = Membership(self.rules, OWN, self.now_s)

    @property
    def view(self) -> View:
        assert self.coordinator.view is not None
        return self.coordinator.view

    def states(self) -> dict[str, str]:
        return {m.server_id: m.state for m in self.view.members if m.kind != "coordinator"}

    def act(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Probe):
                self.probes.append(action)
                continue
            assert isinstance(action, Send)
            if isinstance(action.message, View) and action.message not in self.published[-1:]:
                self.published.append(action.message)
            member = next((m for m in self.members.values() if m.identity == action.identity), None)
            for reply in member.take(action.message) if member is not None else ():
                self.send(member, reply)

    def send(self, member: Member, message: object) -> None:
        self.act(self.coordinator.handle(member.identity, message, self.now_s))

    def renew(self, member: Member) -> None:
        if member.silent:
            return
        if member.registered:
            self.send(member, member.lease())
        else:
            member.registered = True
            self.send(member, member.register())

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds * 10)):
            self.now_s = round(self.now_s + 0.1, 3)
            for number, member in enumerate(list(self.members.values())):
                if abs((self.now_s - self.stagger_s * number) % 1.0) < 0.05:
                    self.renew(member)
            self.act(self.coordinator.tick(self.now_s))

    def kill(self, server_id: str, *, proven: bool = True) -> Member:
        member = self.members.pop(server_id)
        if proven:
            self.act(self.coordinator.handle(b"launcher", ProvenExit(server_id, member.pid, -9), self.now_s))
        return member

    def leave(self, server_id: str) -> None:
        member = self.members.pop(server_id)
        self.send(member, Leave(server_id, member.incarnation))

    def add(self, member: Member) -> Member:
        self.members[member.server_id] = member
        self.renew(member)
        return member


def servers(count: int, **fields: object) -> list[Member]:
    return [Member("expert-server", f"e{i}", state="JOINING", **fields) for i in range(count)]  # type: ignore[arg-type]


C = TypeVar("C", bound=Cluster)


def running(
    count: int = 3,
    routers: int = 1,
    capacity: int = 8,
    *,
    kind: type[C] = Cluster,  # type: ignore[assignment]
    **rules: float,
) -> C:
    """A cluster that has come up: `count` expert servers, routers and a gateway."""
    others = [Member("router", f"r{i}") for i in range(routers)]
    cluster = kind(
        *servers(count, capacity=capacity), *others, Member("gateway", "g0"), **{"expert_servers": count, **rules}
    )
    cluster.run(3.0)
    return cluster
