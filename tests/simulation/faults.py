"""What goes wrong in a run: a list drawn from the seed beforehand, so that any part of it can be replayed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from moering.expert_frames import Reply
from moering.protocol import Held, Lease, Leave, Register, Tokens, View
from tests.simulation.cluster import Cluster, Size
from tests.simulation.member import COORDINATOR

WINDOW_S = 6.0
"""Faults begin within so many seconds after the cluster is up."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: `kind` hits `who` at `at_s` and ends `for_s` later. `dice` decides what else there is to decide."""

    at_s: float
    kind: str
    who: str
    other: str
    for_s: float
    dice: int

    def __str__(self) -> str:
        return f"{self.at_s:7.3f} s: {self.kind} {self.who} ({self.other}, dice {self.dice}) for {self.for_s:.3f} s"


def draw(rng: random.Random, size: Size, start_s: float) -> list[Fault]:
    """A random schedule, in the order of time."""
    servers = [f"e{n}" for n in range(size.servers)]
    routers, gateways = [f"r{n}" for n in range(size.routers)], [f"g{n}" for n in range(size.gateways)]
    everyone = [*servers, *servers, *routers, *routers, COORDINATOR, COORDINATOR, rng.choice(gateways)]
    faults = []
    for _ in range(rng.choice([1, 2, 2, 3, 4, 6])):
        kind = rng.choice(list(KINDS))
        who = rng.choice(everyone)
        if kind in ("slow", "drain"):
            who = rng.choice(servers)
        other = rng.choice(["*", *everyone, *gateways])
        if kind == "break" and rng.random() < 0.5:
            other = COORDINATOR
        for_s = rng.choice([0.05, 0.5, 2.0, 5.0, 8.0]) * (0.5 + rng.random())
        faults.append(Fault(start_s + WINDOW_S * rng.random(), kind, who, other, for_s, rng.randrange(1 << 30)))
    faults.sort(key=lambda f: f.at_s)
    at_once = faults[0].at_s
    if len(faults) > 1 and rng.random() < 0.3:  # several at the same moment
        faults = [replace(f, at_s=at_once + 0.01 * n) for n, f in enumerate(faults)]
    return faults


def schedule(cluster: Cluster, faults: list[Fault]) -> float:
    """Make them happen; the time of the last one's end."""
    end_s = cluster.world.now_s
    for fault in faults:
        cluster.world.after(fault.at_s - cluster.world.now_s, None, _begin, cluster, fault)
        end_s = max(end_s, fault.at_s + fault.for_s)
    return end_s


def _begin(cluster: Cluster, fault: Fault) -> None:
    cluster.world.note(f"fault {fault}")
    KINDS[fault.kind](cluster, fault)


def _later(cluster: Cluster, fault: Fault, undo: Callable[..., None], *args: object) -> None:
    cluster.world.after(fault.for_s, None, undo, *args)


def _kill(cluster: Cluster, fault: Fault) -> None:
    cluster.kill(fault.who, proven=fault.dice % 3 > 0)
    _later(cluster, fault, cluster.start, fault.who)


def _leave(cluster: Cluster, fault: Fault) -> None:
    process = cluster.processes[fault.who]
    if fault.who == COORDINATOR or process.control is None or process.stopped:
        _kill(cluster, fault)
        return
    cluster.leave(process)
    _later(cluster, fault, cluster.start, fault.who)


def _stop(cluster: Cluster, fault: Fault) -> None:
    cluster.stop(fault.who)
    _later(cluster, fault, cluster.resume, fault.who)


def _slow(cluster: Cluster, fault: Fault) -> None:
    server = cluster.processes[fault.who]
    server.slowness = 5.0 + fault.dice % 20
    _later(cluster, fault, setattr, server, "slowness", 1.0)


def _cut(cluster: Cluster, fault: Fault) -> None:
    ways = [[(fault.who, fault.other)], [(fault.other, fault.who)]]
    for way in [ways[0], ways[1], ways[0] + ways[1], ways[0] + ways[1]][fault.dice % 4]:
        cluster.network.cut(*way)
        _later(cluster, fault, _heal, cluster, way, (fault.who, fault.other))
    _hurt(cluster, fault)


def _heal(cluster: Cluster, way: tuple[str, str], who: tuple[str, str]) -> None:
    cluster.network.heal(*way)
    for name in who:
        if name in cluster.processes:
            cluster.oracle.hurt(cluster.processes[name])


def _hurt(cluster: Cluster, fault: Fault) -> None:
    for name in (fault.who, fault.other):
        if name in cluster.processes:
            cluster.oracle.hurt(cluster.processes[name])


def _reset(cluster: Cluster, fault: Fault) -> None:
    """Connections break, and what was under way is lost."""
    for end in list(cluster.processes[fault.who].ends):
        if end.peer is not None and fault.other in ("*", end.peer.process.name):
            cluster.network.reset(end)
    _hurt(cluster, fault)


def _break(cluster: Cluster, fault: Fault) -> None:
    """What is sent is lost, and after a while the connections break."""
    for way in ((fault.who, fault.other), (fault.other, fault.who)):
        cluster.network.cut(*way)
        _later(cluster, fault, _heal, cluster, way, (fault.who, fault.other))
    # Scheduled before the cut ends, so that nothing that was held back arrives.
    cluster.world.after(fault.for_s - 1e-6, None, _reset, cluster, fault)
    _hurt(cluster, fault)


def _drain(cluster: Cluster, fault: Fault) -> None:
    server = cluster.processes[fault.who]
    server.do(server.drain)
    _later(cluster, fault, server.do, server.undrain)


def _double(cluster: Cluster, fault: Fault) -> None:
    """For a while every reply arrives twice."""
    cluster.network.doubling += 1
    _later(cluster, fault, cluster.network.end_doubling)


def _zombie(cluster: Cluster, fault: Fault) -> None:
    """Something answers in the place of a server, as its dead incarnation would, with rows that are not right."""
    for router in cluster.of_kind("router"):
        for end in router.server_ends():
            for d in router.dispatcher.outstanding_at(end.label.server_id)[:1]:
                old = end.label.incarnation - 1 - fault.dice % 3
                rows = np.full((len(d.slots), 1), 1.0, np.float32)
                reply = Reply(router.incarnation, d.seq, old, 0, "float32", len(rows), 1)
                router.do(router.take, end, reply, rows)
                if fault.dice % 2:  # and garbage in the place of the living one
                    wrong = reply._replace(incarnation=end.label.incarnation, rows=len(rows) + 1)
                    router.do(router.take, end, wrong, np.ones((len(rows) + 1, 1), np.float32))


def _stale(cluster: Cluster, fault: Fault) -> None:
    """Old messages arrive once more: replies and tokens, views, and what processes said that are dead by now."""
    rng = random.Random(fault.dice)
    old = list(cluster.network.recent)
    for name, message in rng.sample(old, min(30, len(old))):
        process = cluster.processes.get(name)
        if process is None or not process.alive:
            continue
        if isinstance(message, View) and process.control is not None:
            process.do(process.session.take, message)
        elif isinstance(message, Tokens):
            process.do(process.take, message)
        elif isinstance(message, tuple) and isinstance(message[0], Reply) and name[0] == "r":
            for end in process.server_ends():
                process.do(process.take, end, *message)
        elif isinstance(message, Lease | Held | Leave | Register) and name == COORDINATOR:
            member = message.member if isinstance(message, Register) else message
            current = cluster.processes[member.server_id]
            if current.incarnation != member.incarnation or not current.alive:
                process.do(process.take, b"gone", message)


KINDS: dict[str, Callable[[Cluster, Fault], None]] = {
    "kill": _kill, "kill ": _kill, "leave": _leave, "stop": _stop, "slow": _slow, "cut": _cut, "cut ": _cut,
    "reset": _reset, "break": _break, "drain": _drain, "double": _double, "zombie": _zombie, "stale": _stale,
}  # fmt: skip
