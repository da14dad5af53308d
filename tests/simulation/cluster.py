"""All processes of one simulated cluster, and who starts them again."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from moering.actions import Rules
from moering.protocol import Leave, ProvenExit
from tests.simulation.coordinator import Coordinator
from tests.simulation.expert_server import ExpertServer
from tests.simulation.gateway import Gateway
from tests.simulation.member import COORDINATOR, ControlLink, Member
from tests.simulation.network import End, Network
from tests.simulation.oracle import Oracle
from tests.simulation.router import Router
from tests.simulation.world import Process, World

KINDS: dict[str, Any] = {"e": ExpertServer, "r": Router, "g": Gateway}


@dataclass(frozen=True, slots=True)
class Size:
    """How large a cluster is, and how tight."""

    servers: int
    routers: int
    gateways: int
    layers: int
    experts: int
    replication: int
    capacity: int
    max_pairs: int
    credit_rows: int
    lease_s: float
    grace_s: float
    latency_s: float
    spike_s: float
    load_s: float
    compute_s: float

    @staticmethod
    def draw(rng: random.Random) -> Size:
        """A random size; small ones are the most frequent, because most bugs need no more."""
        servers = rng.choice([3, 3, 3, 3, 4, 4, 5, 6, rng.randint(7, 16)])
        layers, experts = rng.choice([1, 2]), rng.choice([4, 4, 6])
        replication = rng.choice([2, 2, 2, 3])
        needed = -(-layers * experts * replication // servers)
        slack = rng.choice([1.0, 1.5, 3.0])
        return Size(
            servers, rng.choice([1, 2, 2, 3]), rng.choice([1, 1, 2]), layers, experts, replication,
            min(layers * experts, int(needed * slack) + rng.choice([0, 1])), rng.choice([2, 1000]),
            rng.choice([2, 1000]), rng.choice([3.0, 4.0, 10.0]), rng.choice([0.5, 2.0, 5.0]), 0.0005,
            rng.choice([0.01, 0.2, 1.0]), rng.choice([0.005, 0.05, 0.3]), rng.choice([0.01, 0.05]),
        )  # fmt: skip


class Launcher(Process):
    """Tells the coordinator of proven exits."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster.world, "launcher")
        self.control = ControlLink(self, cluster)

    def lost(self, end: End) -> None:
        """Connect again."""
        self.control.lost(end)


class Cluster:
    """The processes by name; a restart puts another object in the place of the dead one."""

    def __init__(self, seed: int, *, tracing: bool = False) -> None:
        self.size = Size.draw(random.Random(f"{seed}/size"))
        self.world = World(f"{seed}/world", tracing=tracing)
        self.network = Network(self.world, self.size.latency_s, self.size.spike_s)
        self.rules = Rules(
            expert_servers=self.size.servers, replication=self.size.replication, lease_s=self.size.lease_s,
            rejoin_grace_s=self.size.grace_s, settle_s=5.0,
        )  # fmt: skip
        self.oracle = Oracle(self)
        self.processes: dict[str, Any] = {}
        self._incarnations = 0
        self.start(COORDINATOR)
        self.launcher = Launcher(self)
        for prefix, count in (("e", self.size.servers), ("r", self.size.routers), ("g", self.size.gateways)):
            for n in range(count):
                self.start(f"{prefix}{n}")

    def members(self) -> list[Member]:
        """All living members, in the order of their names' first appearance."""
        return [p for p in self.processes.values() if isinstance(p, Member) and p.alive]

    def of_kind(self, kind: str) -> list[Any]:
        """The living members of a kind."""
        return [m for m in self.members() if m.kind == kind]

    def load_s(self) -> float:
        """How long loading one expert takes."""
        return self.size.load_s * (0.5 + self.world.rng.random())

    def compute_s(self) -> float:
        """How long one turn of an expert server takes."""
        return self.size.compute_s * (0.5 + self.world.rng.random())

    # --- life and death ---

    def start(self, name: str) -> None:
        """Start a process, unless it runs."""
        old = self.processes.get(name)
        if old is not None and old.alive:
            return
        self._incarnations += 1
        self.world.note(f"start {name}/{self._incarnations}")
        if name == COORDINATOR:
            self.processes[name] = Coordinator(self, self._incarnations)
        else:
            self.processes[name] = KINDS[name[0]](self, name, self._incarnations)

    def kill(self, name: str, *, proven: bool) -> None:
        """SIGKILL. `proven`: the launcher reaps it and tells the coordinator."""
        process = self.processes[name]
        if not process.alive:
            return
        self.world.note(f"kill {name}" + (", proven" if proven else ""))
        self.oracle.hurt(process)
        self.network.died(process)
        self.network.listen()
        if proven and name != COORDINATOR:
            proof = ProvenExit(name, process.pid, -9)
            self.launcher.after(0.02 * self.world.rng.random(), self.launcher.control.send, proof)

    def leave(self, member: Member) -> None:
        """An orderly exit: it says so, and is gone."""
        if member.alive:
            self.oracle.hurt(member)
            member.control.send(Leave(member.name, member.incarnation))
            self.network.died(member)
            self.network.listen()

    def stop(self, name: str) -> None:
        """SIGSTOP."""
        process = self.processes[name]
        if process.alive and not process.stopped:
            self.world.note(f"stop {name}")
            self.oracle.hurt(process)
            process.stopped = True
            self.network.listen()

    def resume(self, name: str) -> None:
        """SIGCONT."""
        process = self.processes[name]
        if process.alive and process.stopped:
            self.world.note(f"continue {name}")
            self.oracle.hurt(process)
            process.resume()
            self.network.listen()
