"""A network on virtual time: connections that keep their order, and everything that can happen to them.

Messages of one connection arrive in order, those of different ones in any. A cut holds messages back, as TCP does,
until it ends or until an end that hears nothing for its heartbeat time gives the connection up. A killed process's
kernel delivers what was sent and then closes; a stopped one is silent.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from moering.expert_frames import Reply
from tests.simulation.world import Process, World

CLOSED = object()
CONNECT_TIMEOUT_S = 1.0


class End:
    """One end of a connection. Without a `peer` nobody answered (yet)."""

    def __init__(self, network: Network, process: Process, heartbeat_s: float) -> None:
        self.network, self.process, self.heartbeat_s = network, process, heartbeat_s
        self.peer: End | None = None
        self.open = True
        self.label: Any = None  # whatever its owner wants to remember
        self.last_arrival_s = 0.0
        self.held_back: list[Any] = []
        self.deaf_since: int | None = None
        process.ends[self] = None

    def send(self, message: Any) -> bool:
        """Send without blocking. False when the connection is over."""
        if self.open and self.peer is not None:
            self.network.transmit(self.peer, message)
        return self.open

    def close(self) -> None:
        """Close; the peer hears of it after all that was sent."""
        if self.open:
            self.open = False
            self.process.ends.pop(self, None)
            if self.peer is not None:
                self.network.transmit(self.peer, CLOSED)

    def arrived(self, message: Any) -> None:
        """The owner reads a message, or the end of the connection."""
        if not self.open:
            return
        if message is not CLOSED:
            self.process.received(self, message)
            return
        self.open = False
        self.process.ends.pop(self, None)
        self.process.lost(self)


class Network:
    """All connections, and the cuts between processes."""

    def __init__(self, world: World, latency_s: float, spike_s: float) -> None:
        self.world, self.latency_s, self.spike_s = world, latency_s, spike_s
        self.processes: dict[str, Process] = {}  # by address
        self.cuts: dict[tuple[str, str], int] = {}  # (from, to) by name, "*" for anyone → how many
        self.doubling = 0
        self.recent: deque[tuple[str, Any]] = deque(maxlen=300)  # (receiver, message)
        self._ends: dict[End, None] = {}
        self._deaf = 0

    # --- connections ---

    def connect(self, process: Process, address: str, heartbeat_s: float) -> End:
        """The client's end of a new connection. If it cannot be made, its owner hears of the loss later."""
        end = End(self, process, heartbeat_s)
        target = self.processes.get(address)
        name = address.partition("/")[0]
        if self.blocked(process.name, name) or self.blocked(name, process.name):
            process.after(CONNECT_TIMEOUT_S, end.arrived, CLOSED)
        elif target is None or not target.alive:
            process.after(self._delay(), end.arrived, CLOSED)
        else:
            end.peer = End(self, target, heartbeat_s)
            end.peer.peer = end
            self._ends[end] = self._ends[end.peer] = None
            self._listen(end)
            self._listen(end.peer)
        return end

    def transmit(self, to: End, message: Any) -> None:
        """Put a message on its way to an end."""
        self.recent.append((to.process.name, message))
        if self.doubling and isinstance(message, tuple) and isinstance(message[0], Reply):
            self._send(to, message)
        self._send(to, message)

    def end_doubling(self) -> None:
        """Replies arrive once again."""
        self.doubling -= 1

    def _send(self, to: End, message: Any) -> None:
        to.last_arrival_s = max(to.last_arrival_s, self.world.now_s + self._delay())
        self.world.after(to.last_arrival_s - self.world.now_s, None, self._arrive, to, message)

    def _arrive(self, to: End, message: Any) -> None:
        if not to.open or to.peer is None:
            return
        if to.held_back or self.blocked(to.peer.process.name, to.process.name):
            to.held_back.append(message)
        else:
            to.process.do(to.arrived, message)

    def _delay(self) -> float:
        rng = self.world.rng
        if rng.random() < 0.05:
            return rng.random() * self.spike_s
        return self.latency_s * (0.5 + rng.random())

    # --- faults ---

    def blocked(self, source: str, target: str) -> bool:
        """Whether nothing gets from one process to another."""
        cuts = self.cuts
        return bool(cuts) and ((source, target) in cuts or (source, "*") in cuts or ("*", target) in cuts)

    def cut(self, source: str, target: str) -> None:
        """From now on nothing gets through this way."""
        self.cuts[source, target] = self.cuts.get((source, target), 0) + 1
        self.listen()

    def heal(self, source: str, target: str) -> None:
        """End one `cut`; what was held back arrives."""
        self.cuts[source, target] -= 1
        if not self.cuts[source, target]:
            del self.cuts[source, target]
        for end in list(self._ends):
            if end.open and end.held_back and not self.blocked(end.peer.process.name, end.process.name):
                held_back, end.held_back = end.held_back, []
                for message in held_back:
                    self.transmit(end, message)
        self.listen()

    def reset(self, end: End) -> None:
        """The connection breaks at once; what was under way is lost."""
        for e in (end, end.peer):
            if e is not None and e.open:
                e.open = False
                e.process.ends.pop(e, None)
                e.process.do(e.process.lost, e)

    def died(self, process: Process) -> None:
        """The kernel closes what a dead process had open."""
        process.alive = False
        for end in list(process.ends):
            end.close()

    def listen(self) -> None:
        """Something has changed about who hears whom."""
        self._ends = {e: None for e in self._ends if e.open}
        for end in self._ends:
            self._listen(end)

    def _listen(self, end: End) -> None:
        peer = end.peer.process
        hears = peer.alive and not peer.stopped and not self.blocked(peer.name, end.process.name)
        if hears:
            end.deaf_since = None
        elif end.deaf_since is None:
            self._deaf += 1
            end.deaf_since = self._deaf
            self.world.after(
                end.heartbeat_s * (1.0 + 0.3 * self.world.rng.random()), None, self._give_up, end, self._deaf
            )

    def _give_up(self, end: End, since: int) -> None:
        if end.open and end.deaf_since == since:
            end.process.do(self._lose, end)

    def _lose(self, end: End) -> None:
        if end.open:
            end.close()
            end.process.lost(end)
