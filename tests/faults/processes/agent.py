"""The part of the fault injection that runs inside a process: carries out what the test's `Hub` has armed.

The product has no hooks for this. The modules beside this one wrap methods of the product's classes so that they ask
`Agent.hit` at their *points*, and then run the product's own `main`. A fault is data::

    {"no": 7, "point": "received", "match": {"prefill": false}, "skip": 3, "action": "block"}

It fires at the hit after `skip` hits of its point whose facts contain `match`, and tells the hub so before anything
else happens. The agent itself blocks (until the hub releases it), dies or fails there; all other actions are the
wrapper's to carry out. A fault with "stays" fires at each further hit as well, until it is released.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np

HUB = "MOERING_TEST_HUB"


@dataclass(eq=False)
class Fault:
    no: int
    point: str
    action: str
    match: dict[str, Any] = field(default_factory=dict)
    skip: int = 0
    stays: bool = False
    released: threading.Event = field(default_factory=threading.Event)


class Agent:
    """Connects to the hub at its making, and returns from that when the hub lets this process start."""

    def __init__(self, server_id: str) -> None:
        self._armed: dict[str, list[Fault]] = {}
        self._faults: dict[int, Fault] = {}
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(os.environ[HUB])
        self._lines = self._socket.makefile("rb")
        self._say({"hello": server_id, "pid": os.getpid()})
        start = json.loads(self._lines.readline())
        self.argv: list[str] = start["argv"]
        self.settings: dict[str, Any] = start["settings"]
        for fault in start["faults"]:
            self._arm(fault)
        threading.Thread(target=self._listen, name="fault-agent", daemon=True).start()

    def hit(self, point: str, **facts: Any) -> Fault | None:
        """The fault that fires here and now, for the caller to carry out unless it is the agent's to do."""
        fault = self._due(point, facts) if point in self._armed else None
        if fault is None:
            return None
        self._say({"fired": fault.no, "facts": facts})
        if fault.action == "block":
            fault.released.wait()
        elif fault.action == "exit":
            os._exit(3)
        elif fault.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.action == "out of memory":
            np.empty(1 << 60, np.uint8)  # raises what an allocation that fails raises
        return fault

    def wants(self, point: str) -> bool:
        """Whether anything is armed there: facts that cost something are gathered only then."""
        return point in self._armed

    def _due(self, point: str, facts: dict[str, Any]) -> Fault | None:
        with self._lock:
            for fault in self._armed.get(point, ()):
                if any(facts.get(k) != v for k, v in fault.match.items()):
                    continue
                if fault.skip:
                    fault.skip -= 1
                    continue
                if not fault.stays:
                    self._disarm(fault)
                return fault
        return None

    def _listen(self) -> None:
        for line in self._lines:
            message = json.loads(line)
            if "arm" in message:
                self._arm(message["arm"])
                self._say({"armed": message["arm"]["no"]})
            else:
                fault = self._faults[message["release"]]
                with self._lock:
                    self._disarm(fault)
                fault.released.set()

    def _arm(self, fields: dict[str, Any]) -> None:
        fault = Fault(**fields)
        with self._lock:
            self._faults[fault.no] = fault
            self._armed.setdefault(fault.point, []).append(fault)

    def _disarm(self, fault: Fault) -> None:
        armed = self._armed.get(fault.point, [])
        if fault in armed:
            armed.remove(fault)
        if not armed:
            self._armed.pop(fault.point, None)

    def _say(self, message: dict[str, Any]) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\n")
