"""A router: the real `Dispatcher` between virtual connections and a model of the engine.

The connections follow `router.exchange`, line by line where order matters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moering.errors import ProtocolError
from moering.expert_frames import Dispatch as DispatchMessage
from moering.expert_frames import Reply
from moering.protocol import Abort, Failed, Hello, MemberInfo, NotHere, Refused, Submit, View, Welcome
from router.dispatch import Dispatcher
from router.exchange import HANDSHAKE_S, REFUSED_RETRY_S, RETRY_S
from router.instructions import Complete, Instruction, Poisoned, Send
from tests.simulation.engine import Engine, Flight
from tests.simulation.member import DATA_HEARTBEAT_S, DIGEST, MODEL, Member
from tests.simulation.network import End

if TYPE_CHECKING:
    from tests.simulation.cluster import Cluster

LOOK_S = 0.1


class Router(Member):
    """Serves gateways with the help of expert servers."""

    kind = "router"

    def __init__(self, cluster: Cluster, server_id: str, incarnation: int) -> None:
        super().__init__(cluster, server_id, incarnation)
        self.dispatcher = Dispatcher()
        self.engine = Engine(self)
        self._members: dict[str, MemberInfo] = {}
        self._connections: dict[str, End] = {}
        self._welcomed: dict[End, None] = {}
        self._retry_at: dict[str, float] = {}
        self._flights: dict[int, Flight] = {}
        self._poisoned: dict[int, list[np.ndarray]] = {}
        self._next_work = 0
        self._judge_at_s = float("inf")
        self.join()
        self.after(LOOK_S, self._look)

    # --- the engine's side ---

    def submit(self, flight: Flight, slots: np.ndarray | None = None) -> None:
        """Have the experts of the flight's layer computed, all or just these slots."""
        self._next_work += 1
        self._flights[self._next_work] = flight
        self._do(
            self.dispatcher.submit(
                self._next_work, flight.layer, flight.topk_ids, slots, flight.prefill, self.world.now_s
            )
        )

    def routable(self, layer: int, experts: np.ndarray) -> bool:
        """Whether any of these experts of a layer has a live replica now."""
        return bool(self.dispatcher.routable(layer, experts, self.world.now_s).any())

    # --- connections ---

    def view_changed(self, view: View) -> None:
        """Follow a newer plan: connect to who is new, let go of who is gone."""
        servers = {m.server_id: m for m in view.members if m.kind == "expert-server" and m.state != "OFFLINE"}
        self._members = servers
        self.dispatcher.view_changed(view, self.world.now_s)
        for server_id, end in list(self._connections.items()):
            member = servers.get(server_id)
            if member is None or member.incarnation != end.label.incarnation:
                self._lose(end)
        self._connect_missing()
        self.engine.routes_changed()

    def _connect_missing(self) -> None:
        now = self.world.now_s
        for server_id, member in self._members.items():
            end = self._connections.get(server_id)
            due = self._retry_at.get(server_id, 0.0)
            if end is not None and end not in self._welcomed and now >= due:
                self._lose(end)
            elif end is None and now >= due:
                self._retry_at[server_id] = now + HANDSHAKE_S
                end = self.cluster.network.connect(self, member.address, DATA_HEARTBEAT_S)
                end.label = member
                self._connections[server_id] = end
                end.send((Hello(self.name, self.incarnation, MODEL, DIGEST), None))

    def _look(self) -> None:
        self.progress += 1
        self._connect_missing()
        self.engine.look()
        self.queued = len(self.engine.sequences)
        self.after(LOOK_S, self._look)

    @property
    def suspects(self) -> list[str]:
        """Servers of the plan that this router routes around."""
        up = {s for s, end in self._connections.items() if end in self._welcomed}
        return [s for s, member in self._members.items() if s not in up and member.state != "JOINING"]

    def lost(self, end: End) -> None:
        """The connection to the coordinator, to a server or to a gateway is over."""
        if self.control.lost(end):
            return
        if isinstance(end.label, MemberInfo):
            if self._connections.get(end.label.server_id) is end:
                self._lose(end)
        else:
            self.engine.gateway_gone(end)

    def _lose(self, end: End, retry_s: float = RETRY_S) -> None:
        server_id = end.label.server_id
        end.close()
        del self._connections[server_id]
        self._welcomed.pop(end, None)
        self._retry_at[server_id] = self.world.now_s + retry_s
        self._do(self.dispatcher.disconnected(server_id, self.world.now_s))

    def server_ends(self) -> list[End]:
        """The connections to expert servers that are in use."""
        return list(self._welcomed)

    # --- messages ---

    def received(self, end: End, message: Any) -> None:
        """A message of the coordinator, of a server (with its tensor) or of a gateway."""
        if self.is_control(end):
            super().received(end, message)
        elif isinstance(message, tuple):
            self.take(end, *message)
        elif isinstance(message, Submit):
            self.engine.submitted(end, message)
        elif isinstance(message, Abort):
            self.engine.abort(message.request_id, message.attempt)
        elif isinstance(message, Hello):
            end.send(Welcome(self.name, self.incarnation, 64, 64))

    def take(self, end: End, message: Any, tensor: np.ndarray | None) -> None:
        """A message of an expert server."""
        server, now = end.label.server_id, self.world.now_s
        if isinstance(message, Reply):
            self._put(end, message, tensor)
        elif isinstance(message, NotHere):
            self._do(self.dispatcher.not_here(server, message.incarnation, message.seq, now))
        elif isinstance(message, Welcome) and message.incarnation == end.label.incarnation:
            self._welcomed[end] = None
            self.dispatcher.connected(server, message.incarnation, message.credit_rows, message.max_rows, now)
            self.engine.routes_changed()
        elif isinstance(message, Refused | Failed | Welcome):
            self._lose(end, REFUSED_RETRY_S)

    def _put(self, end: End, reply: Reply, tensor: np.ndarray) -> None:
        try:
            d = self.dispatcher.find(end.label.server_id, reply.incarnation, reply.seq, reply.rows)
        except ProtocolError:
            self.cluster.oracle.counts["blows"] += 1
            self._lose(end, REFUSED_RETRY_S)
            return
        if d is not None:
            self.cluster.oracle.accepted_reply(self, end.label.incarnation, reply)
            if not d.wanted:
                self._do(self.dispatcher.replied(d, self.world.now_s))
                return
            slots, rows = (d.slots, tensor) if d.open is None else (d.slots[d.open], tensor[d.open])
            self._flights[d.work].add(slots, rows)
            self._do(self.dispatcher.replied(d, self.world.now_s))

    def _do(self, instructions: list[Instruction]) -> None:
        for i in instructions:
            if isinstance(i, Send):
                self._send(i)
            elif isinstance(i, Poisoned):
                self._poisoned.setdefault(i.work, []).append(i.rows)
            elif isinstance(i, Complete):
                poisoned = self._poisoned.pop(i.work, [np.empty(0, np.int64)])
                flight = self._flights.pop(i.work)
                # Not at once: the engine may be in the middle of something that this would change.
                self.after(0.0, self.engine.advance, flight, i.missing, np.concatenate(poisoned))

        if self.dispatcher.due_s < self._judge_at_s:
            self._judge_at_s = self.dispatcher.due_s
            self.after(max(0.0, self._judge_at_s - self.world.now_s), self._judge)

    def _judge(self) -> None:
        """What has arrived was taken in already: judge what is late."""
        self._judge_at_s = float("inf")
        if self.world.now_s >= self.dispatcher.due_s:
            self._do(self.dispatcher.tick(self.world.now_s))
        else:
            self._do([])

    def _send(self, send: Send) -> None:
        d = send.dispatch
        self.cluster.oracle.dispatched(self, d)
        rows = self._flights[d.work].x[d.rows].astype(np.float32)[:, None]
        pairs = d.local_rows().tobytes() + d.experts.astype("<u2").tobytes()
        message = DispatchMessage(self.incarnation, d.seq, d.layer, d.prefill, pairs, "float32", *rows.shape)
        self._connections[d.server].send((message, memoryview(rows).cast("B")))
