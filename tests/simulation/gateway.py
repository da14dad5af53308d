"""A gateway and its clients: the real journal around a model of the pool of routers (`gateway.router_pool`)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from gateway.journal import Event, Journal, Record
from gateway.router_pool import MAX_FRUITLESS_ATTEMPTS
from moering.protocol import Abort, Failed, Hello, MemberInfo, Sampling, Tokens, View, Welcome
from tests.simulation.member import MODEL, ROUTER_HEARTBEAT_S, Member
from tests.simulation.network import End

if TYPE_CHECKING:
    from tests.simulation.cluster import Cluster

RECONNECT_S, REQUEST_TIMEOUT_S = 0.2, 600.0
Key = tuple[str, int]


class Gateway(Member):
    """Accepts requests and sees each to its end."""

    kind = "gateway"

    def __init__(self, cluster: Cluster, server_id: str, incarnation: int) -> None:
        super().__init__(cluster, server_id, incarnation)
        self.journal = Journal()
        self.failovers = 0
        self._members: dict[Key, MemberInfo] = {}
        self._links: dict[Key, End] = {}
        self._ready: dict[End, None] = {}
        self._routes: dict[Record, End] = {}
        self._held: dict[Record, None] = {}
        self.join()

    def request(self, request_id: str, prompt: list[int], max_tokens: int) -> None:
        """A client asks."""
        deadline_s = self.world.now_s + REQUEST_TIMEOUT_S
        sink = partial(self._event, request_id)
        record = Record(request_id, prompt, Sampling(max_tokens), deadline_s, sink)
        self.cluster.oracle.accepted(request_id, prompt, max_tokens, self)
        self.journal.add(record)
        self.after(REQUEST_TIMEOUT_S, self._expire, record)
        self._assign(record)

    def _event(self, request_id: str, event: Event) -> None:
        self.cluster.oracle.event(request_id, event)

    def _expire(self, record: Record) -> None:
        self.journal.fail(record, "timeout", "too late")
        self._routes.pop(record, None)

    # --- routers ---

    def view_changed(self, view: View) -> None:
        """Follow the routers of a newer view."""
        routers = {(m.server_id, m.incarnation): m for m in view.members if m.kind == "router"}
        self._members = {k: m for k, m in routers.items() if m.state in ("ONLINE", "DRAINING")}
        for key in [k for k in self._links if k not in self._members]:
            self._drop(key)
        for key in self._members:
            self._connect(key)
        self._submit_held()

    def _connect(self, key: Key) -> None:
        if key in self._links or key not in self._members:
            return
        end = self._links[key] = self.cluster.network.connect(self, self._members[key].address, ROUTER_HEARTBEAT_S)
        end.label = key
        end.send(Hello(self.name, self.incarnation, MODEL, ""))

    def lost(self, end: End) -> None:
        """The connection to the coordinator or to a router is over."""
        if not self.control.lost(end) and self._links.get(end.label) is end:
            self._drop(end.label)

    def _drop(self, key: Key) -> None:
        end = self._links.pop(key)
        end.close()
        self._ready.pop(end, None)
        orphans = [r for r, e in self._routes.items() if e is end]
        for record in orphans:
            del self._routes[record]
            self._assign(record)
        self.after(RECONNECT_S, self._connect, key)

    def _assign(self, record: Record) -> None:
        usable = [e for e in self._ready if e.label in self._members]
        if not usable:
            self._held[record] = None
            return
        if record.fruitless >= MAX_FRUITLESS_ATTEMPTS:
            self.journal.fail(record, "poison", "each router that computed it was lost")
            self._held.pop(record, None)
            return
        loads = {e: sum(x is e for x in self._routes.values()) for e in usable}
        end = min(usable, key=lambda e: loads[e])
        self.failovers += bool(record.attempt)
        self._held.pop(record, None)
        self._routes[record] = end
        end.send(record.next_submit(self.world.now_s))

    def _submit_held(self) -> None:
        for record in list(self._held):
            self._assign(record)

    def received(self, end: End, message: Any) -> None:
        """A message of the coordinator or of a router."""
        self.progress += 1
        if self.is_control(end):
            super().received(end, message)
        elif isinstance(message, Welcome):
            self._ready[end] = None
            self._submit_held()
        else:
            self.take(message)

    def take(self, message: Any) -> None:
        """Tokens or a failure, as a router sends them."""
        ended: list[Record | None] = []
        if isinstance(message, Tokens):
            ended = [self.journal.take(token) for token in message.tokens]
        elif isinstance(message, Failed):
            ended = [self.journal.take_failed(message)]
        for record in ended:
            if record is not None:
                self._routes.pop(record, None)

    def abort(self, request_id: str) -> None:
        """A client goes away."""
        record = next((r for r in self.journal.records() if r.request_id == request_id), None)
        if record is None or not self.journal.close(record):
            return
        self.cluster.oracle.cancelled(request_id)
        self._held.pop(record, None)
        end = self._routes.pop(record, None)
        if end is not None:
            end.send(Abort(record.request_id, record.attempt))
