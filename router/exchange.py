"""The zmq shell of the dispatch state machine: carries rows to expert servers and puts their results in place.

It decides nothing: it turns messages, connections and lost connections into events of `Dispatcher`, and carries out
its instructions. Used by the engine's thread only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import zmq

from moering import protocol
from moering.errors import ProtocolError
from moering.expert_frames import Reply
from moering.protocol import Failed, Hello, MemberInfo, NotHere, Refused, View, Welcome
from moering.shared_rows import Pin
from router.connection import Connection
from router.dispatch import Dispatcher
from router.expert_rows import ExpertRows, Reading
from router.instructions import Complete, Dispatch, Instruction, Poisoned, Send

logger = logging.getLogger(__name__)

RETRY_S = 0.1  # between attempts to reach a server that the plan still names
REFUSED_RETRY_S = 5.0  # after an answer that will hardly change
HANDSHAKE_S = 2.0


class Rows(Protocol):
    """What the exchange needs of a micro-batch."""

    prefill: bool

    @property
    def layer(self) -> int:
        """The layer whose experts are to be computed."""
        ...

    @property
    def topk_ids(self) -> np.ndarray:
        """The experts of each row: int64 [n, k]."""
        ...

    @property
    def expert_rows(self) -> ExpertRows:
        """Their inputs and outputs."""
        ...


@dataclass(frozen=True, slots=True)
class Finished:
    """All that can be computed now of a micro-batch's layer is. `missing` slots have no live replica."""

    micro_batch: Any
    missing: np.ndarray
    deaths: np.ndarray  # of the missing slots, to be given back with them
    poisoned: np.ndarray  # rows to be failed


class Exchange:
    """All connections to expert servers, and the works in progress."""

    def __init__(
        self,
        hello: Hello,
        hidden_size: int,
        poller: zmq.Poller,
        clock: Callable[[], float],
        pin: Pin | None = None,
    ) -> None:
        """`pin` prepares shared memory for the GPU of this process."""
        self.dispatcher = Dispatcher()
        self.changed = False  # routes were gained since the engine last looked: held slots may be tried again
        self._hello, self._hidden_size, self._poller, self._clock = hello, hidden_size, poller, clock
        self._pin = pin
        self._members: dict[str, MemberInfo] = {}
        self._planned = False
        self._connections: dict[str, Connection] = {}
        self._by_socket: dict[Any, Connection] = {}
        self._retry_at: dict[str, float] = {}
        self._met: set[tuple[str, int]] = set()  # incarnations that welcomed us, or failed to at least once
        self._micro_batches: dict[int, Any] = {}
        self._poisoned: dict[int, list[np.ndarray]] = {}
        self._finished: list[Finished] = []
        self._next_work = 0

    # --- the engine's side ---

    def submit(self, micro_batch: Rows, slots: np.ndarray | None = None, deaths: np.ndarray | None = None) -> None:
        """Have the experts of the micro-batch's layer computed, all or just these slots; see `take_finished`."""
        self._next_work += 1
        self._micro_batches[self._next_work] = micro_batch
        now = self._clock()
        self._do(
            self.dispatcher.submit(
                self._next_work, micro_batch.layer, micro_batch.topk_ids, slots, micro_batch.prefill, now, deaths
            )
        )  # fmt: skip

    def routable(self, layer: int, experts: np.ndarray) -> bool:
        """Whether any of these experts of a layer has a live replica now."""
        return bool(self.dispatcher.routable(layer, experts, self._clock()).any())

    def take_finished(self) -> list[Finished]:
        """Works that ended since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def view_changed(self, view: View) -> None:
        """Follow a newer plan: connect to who is new, let go of who is gone."""
        servers = {m.server_id: m for m in view.members if m.kind == "expert-server" and m.state != "OFFLINE"}
        self._members, self._planned = servers, True
        self._met &= {(m.server_id, m.incarnation) for m in servers.values()}
        self.dispatcher.view_changed(view, self._clock())
        for connection in list(self._connections.values()):
            member = servers.get(connection.server_id)
            if member is None or member.incarnation != connection.incarnation:
                self._lose(connection, "the plan has it no more")
        self.connect_missing()
        self.changed = True

    def connect_missing(self) -> None:
        """Connect to servers of the plan that we are not connected to, each when its time has come."""
        now = self._clock()
        for server_id, member in self._members.items():
            connection = self._connections.get(server_id)
            due = self._retry_at.get(server_id, 0.0)
            if connection is not None and not connection.welcomed and now >= due:
                self._lose(connection, "no answer to hello")
            elif connection is None and now >= due and member.address:
                self._retry_at[server_id] = now + HANDSHAKE_S
                self._connect(member)

    @property
    def due_s(self) -> float:
        """When `tick` has something to judge next; infinity while nothing is outstanding."""
        return self.dispatcher.due_s

    def tick(self) -> None:
        """Judge what is late, after taking in what has arrived meanwhile: it may only be we who were slow."""
        if self._clock() < self.dispatcher.due_s:
            return
        for connection in list(self._connections.values()):
            while self._receive(connection):
                pass
        self._do(self.dispatcher.tick(self._clock()))

    @property
    def suspects(self) -> list[str]:
        """Servers of the plan that this router routes around. May be read by any thread, as the next two may."""
        # Values, as keys, are copied in one piece. Pairs are not: making one may begin a garbage collection, in which
        # finalizers let other threads run.
        up = {c.server_id for c in list(self._connections.values()) if c.welcomed}
        return [s for s, member in self._members.items() if s not in up and member.state != "JOINING"]

    @property
    def wedged(self) -> list[str]:
        """Servers that are connected, but have answered nothing for long though something is overdue."""
        now, health = self._clock(), self.dispatcher.health  # which only grows
        return [s for s in list(health) if health[s].connected and health[s].is_wedged(now)]

    @property
    def passed_over(self) -> dict[str, str]:
        """Servers of the plan that others come before, and why."""
        now, health = self._clock(), self.dispatcher.health
        known = {s: health[s].complaint(now) for s in list(health) if s in self._members}
        return dict.fromkeys(self.suspects, "unreachable") | {s: why for s, why in known.items() if why}

    @property
    def acquainted(self) -> bool:
        """Whether there is a plan, and each server that serves by it has answered, or failed to."""
        return self._planned and not self.settling

    @property
    def settling(self) -> bool:
        """Whether a server that serves has yet to answer our first hello: what has no replica now may have one soon."""
        return any(
            not connection.welcomed and connection.key not in self._met
            for server_id, connection in self._connections.items()
            if self._members[server_id].state in ("ONLINE", "DRAINING")
        )

    # --- messages ---

    def handle(self, ready: list[tuple[Any, int]]) -> None:
        """Act on what a poll found. Replies come before losses: a dead server's last answers still count."""
        found = [(socket, c) for socket, _ in ready if (c := self._by_socket.get(socket)) is not None]
        for socket, connection in found:
            if socket is not connection.watch:
                self._receive(connection)  # one message: what else is there the next poll finds at once
        for socket, connection in found:
            if socket is not connection.socket and connection.open and connection.lost():
                while self._receive(connection):
                    pass
                self._lose(connection, "the connection is lost")

    def close(self) -> None:
        """Close all connections."""
        self._members = {}  # first: the lease's thread is not to take us for one that lost them all
        for connection in list(self._connections.values()):
            self._close(connection)

    def _connect(self, member: MemberInfo) -> None:
        try:
            connection = Connection(member, self._hello, self._hidden_size, self._pin)
        except (OSError, zmq.ZMQError) as e:
            logger.warning("cannot connect to %s at %s: %s; trying again", member.server_id, member.address, e)
            return
        self._connections[member.server_id] = connection
        self._listen(connection)

    def _listen(self, connection: Connection) -> None:
        self._by_socket.update(dict.fromkeys(connection.sources, connection))
        connection.register(self._poller)

    def _receive(self, connection: Connection) -> bool:
        """Act on the next message; False when there is none."""
        frames = connection.receive() if connection.open else None
        if frames is None:
            return False
        try:
            message, tensor = protocol.decode(frames)
        except ProtocolError as e:
            self._lose(connection, f"a bad message ({e})", REFUSED_RETRY_S)
        else:
            self._take(connection, message, tensor)
        return True

    def _take(self, connection: Connection, message: Any, tensor: memoryview | None) -> None:
        server, now = connection.server_id, self._clock()
        if isinstance(message, Reply):
            self._put(connection, message, tensor)
        elif isinstance(message, NotHere):
            connection.release(connection.answered(message.seq))
            self._do(self.dispatcher.not_here(server, message.incarnation, message.seq, now))
        elif isinstance(message, Welcome) and message.incarnation == connection.incarnation:
            self._welcome(connection, message)
        elif isinstance(message, Refused | Failed):
            reason = message.reason if isinstance(message, Refused) else message.message
            logger.error("%s refused: %s", server, reason)
            self._lose(connection, "it refused", REFUSED_RETRY_S)
        else:
            self._lose(connection, f"an unexpected {message.KIND}", REFUSED_RETRY_S)

    def _welcome(self, connection: Connection, message: Welcome) -> None:
        try:
            connection.welcome(message)
        except ProtocolError as e:
            self._lose(connection, f"a bad welcome ({e})", REFUSED_RETRY_S)
        else:
            server, now = connection.server_id, self._clock()
            # The end of what was warned of. A first contact is no news: the server says itself that it is online.
            level = logging.INFO if connection.key in self._met else logging.DEBUG
            self._met.add(connection.key)
            self._listen(connection)
            self.dispatcher.connected(server, message.incarnation, message.credit_rows, message.max_rows, now)
            self.changed = True
            logger.log(level, "connected to %s: %s", server, connection.terms)

    def _put(self, connection: Connection, reply: Reply, tensor: memoryview | None) -> None:
        """Write the rows of a reply to the slots it answers."""
        slot = connection.answered(reply.seq)
        try:
            d = self.dispatcher.find(connection.server_id, reply.incarnation, reply.seq, reply.rows)
            if d is None:
                connection.release(slot)
                return
            rows = connection.rows_of(reply, slot, tensor)
        except ProtocolError as e:
            self._lose(connection, f"a bad reply ({e})", REFUSED_RETRY_S)
            return
        connection.release(slot, self._take_in(d, rows, connection.memory_of(slot)) if d.wanted else None)
        self._do(self.dispatcher.replied(d, self._clock()))

    def _take_in(self, d: Dispatch, rows: np.ndarray, memory: object | None) -> Reading | None:
        expert_rows = self._micro_batches[d.work].expert_rows
        if d.open is None:
            return expert_rows.put(d.slots, rows, memory)
        return expert_rows.put(d.slots[d.open], rows[d.open])  # another replica was faster with the rest

    def _do(self, instructions: list[Instruction]) -> None:
        for i in instructions:
            if isinstance(i, Send):
                d = i.dispatch
                connection, rows = self._connections[d.server], self._micro_batches[d.work].expert_rows
                # A failed send needs no answer here: the connection is lost, which will bring the dispatch back.
                connection.send(d, rows)
            elif isinstance(i, Poisoned):
                self._poisoned.setdefault(i.work, []).append(i.rows)
            elif isinstance(i, Complete):
                poisoned = self._poisoned.pop(i.work, [np.empty(0, np.int64)])
                mb = self._micro_batches.pop(i.work)
                self._finished.append(Finished(mb, i.missing, i.deaths, np.concatenate(poisoned)))

    def _lose(self, connection: Connection, why: str, retry_s: float = RETRY_S) -> None:
        server, now = connection.server_id, self._clock()
        self._close(connection)
        self._met.add(connection.key)
        self._retry_at[server] = now + retry_s
        outstanding = len(self.dispatcher.outstanding_at(server))
        if connection.welcomed:
            logger.warning("%s: %s; sending %d dispatches to replicas", server, why, outstanding)
        self._do(self.dispatcher.disconnected(server, now))

    def _close(self, connection: Connection) -> None:
        connection.unregister(self._poller)
        for source in connection.sources:
            del self._by_socket[source]
        del self._connections[connection.server_id]
        connection.close()
