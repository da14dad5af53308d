"""The test's side of the fault injection: arms faults in running processes, and those that the next start finds armed.

A `Gate` is an armed fault as the test sees it: `wait_fired` returns once a process has reached it, `release` lets that
process go on. Nothing here waits for time to pass.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.integration.cluster import DEADLINE_S


@dataclass(eq=False)
class Peer:
    """One process that has an agent."""

    server_id: str
    pid: int
    stream: socket.socket
    lock: threading.Lock = field(default_factory=threading.Lock)

    def say(self, message: dict[str, Any]) -> None:
        """Send; a process that is dead hears nothing."""
        with self.lock, contextlib.suppress(OSError):
            self.stream.sendall(json.dumps(message).encode() + b"\n")


@dataclass(eq=False)
class Gate:
    """One armed fault."""

    server_id: str
    fields: dict[str, Any]
    peer: Peer | None = None
    armed: threading.Event = field(default_factory=threading.Event)
    fired: threading.Event = field(default_factory=threading.Event)
    facts: dict[str, Any] = field(default_factory=dict)

    def wait_fired(self) -> None:
        """Until a process has reached it."""
        assert self.fired.wait(DEADLINE_S), f"never reached: {self.fields} of {self.server_id}"

    def release(self) -> None:
        """Let the process that is blocked there go on, and disarm a fault that stays."""
        if self.peer is not None:
            self.peer.say({"release": self.fields["no"]})


class Hub:
    """Where all agents of one cluster connect."""

    def __init__(self, directory: Path, prefix: str) -> None:
        """`prefix`: what ids begin with on the wire and not here, where they do."""
        self.path = str(directory / "hub")
        self._prefix = prefix
        self.settings: dict[str, dict[str, Any]] = defaultdict(dict)  # by server id, for its agent
        self.argv: dict[str, list[str]] = {}  # further flags by server id; they win over the launcher's
        self._peers: dict[str, Peer] = {}
        self._gates: dict[int, Gate] = {}
        self._at_start: dict[str, list[Gate]] = defaultdict(list)
        self._always: dict[str, Gate] = {}
        self._holds: dict[str, Hold] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(64)
        threading.Thread(target=self._accept, name="hub", daemon=True).start()

    def arm(self, server_id: str, point: str, action: str = "block", **fields: Any) -> Gate:
        """Arm a fault in the running process; it is in force when this returns."""
        gate = self._gate(server_id, point, action, fields)
        gate.peer = self._peers[server_id]
        gate.peer.say({"arm": gate.fields})
        assert gate.armed.wait(DEADLINE_S), f"{server_id} does not take orders"
        return gate

    def arm_next(self, server_id: str, point: str, action: str = "block", **fields: Any) -> Gate:
        """Arm a fault in the next process that starts under this id."""
        gate = self._gate(server_id, point, action, fields)
        with self._lock:
            self._at_start[server_id].append(gate)
        return gate

    def arm_always(self, server_id: str, point: str, action: str, **fields: Any) -> Gate:
        """Arm a fault in the running process, and in each that starts after it under this id."""
        gate = self.arm(server_id, point, action, **fields)
        self._always[server_id] = gate
        return gate

    def disarm_always(self) -> None:
        """The next processes are spared; those that run are, too."""
        gates = list(self._always.values())
        self._always.clear()
        for gate in gates:
            gate.release()

    def hold_start(self, server_id: str) -> Hold:
        """Keep the next process of this id from starting until the hold is released."""
        with self._lock:
            hold = self._holds[server_id] = Hold()
        return hold

    def pid(self, server_id: str) -> int:
        """Of the last process that started under this id."""
        return self._peers[server_id].pid

    def close(self) -> None:
        """Hear no more."""
        self._listener.close()

    def _gate(self, server_id: str, point: str, action: str, fields: dict[str, Any]) -> Gate:
        no = next(self._numbers)
        gate = self._gates[no] = Gate(server_id, {"no": no, "point": point, "action": action, **fields})
        return gate

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                stream, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(stream,), daemon=True).start()

    def _serve(self, stream: socket.socket) -> None:
        with stream, stream.makefile("rb") as lines, contextlib.suppress(OSError):
            hello = json.loads(lines.readline())
            self._start(Peer(hello["hello"].removeprefix(self._prefix), hello["pid"], stream))
            for line in lines:
                self._take(json.loads(line))

    def _start(self, peer: Peer) -> None:
        with self._lock:
            hold = self._holds.pop(peer.server_id, None)
        if hold is not None:
            hold.reached.set()
            hold.released.wait()
        with self._lock:
            gates = self._at_start.pop(peer.server_id, [])
            gates += [self._always[peer.server_id]] if peer.server_id in self._always else []
            self._peers[peer.server_id] = peer
        for gate in gates:
            gate.peer = peer
        orders = {
            "argv": self.argv.get(peer.server_id, []),
            "settings": self.settings[peer.server_id],
            "faults": [g.fields for g in gates],
        }
        peer.say(orders)

    def _take(self, message: dict[str, Any]) -> None:
        if "armed" in message:
            self._gates[message["armed"]].armed.set()
        else:
            gate = self._gates[message["fired"]]
            gate.facts = message["facts"]
            gate.fired.set()


@dataclass(eq=False)
class Hold:
    """A process that is not allowed to start yet."""

    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def wait_reached(self) -> None:
        """Until there is such a process."""
        assert self.reached.wait(DEADLINE_S), "nothing was started"

    def release(self) -> None:
        """Let it start."""
        self.released.set()
