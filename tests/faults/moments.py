"""The moments of the kill matrix: a cell's victim is brought there by gates, and held there until the fault hits."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from tests.faults import draining
from tests.faults.arena import RELAYED, ROUTERS, Arena
from tests.faults.hub import Gate
from tests.faults.matrix import CUTS, LOADS, REPLIES, Cell
from tests.faults.relay import Relay
from tests.faults.spare import Spare, server_id_of, spare
from tests.faults.visitor import visiting

PHASES = {"prefill": ("received", True, 0), "decode": ("received", False, 4)}
PHASES |= {"reply": ("replying", False, 4), "recovery": PHASES["decode"], "draining": PHASES["decode"]}
"""Point, whether a prompt is computed there, and how many such hits go by before; the streams have 24 tokens."""
AGENTS_OWN = ("exit", "out of memory", "garbage", "wrong shape", "twice", "slow", "full disk")
"""What happens in the process that is hit; for all other faults it is held at the gate."""
WHILE_LOADING = ("exit", *LOADS)
STAYS = ("slow", "full disk")
ON_THE_DATA_PATH = {"expert server": "expert-0", "router": "router-1", "gateway": "gateway-0"}
"""Where a fault of each kind hits, unless it needs a relay or a fixed address."""
OBSERVER = "expert-0"
"""Holds the streams in their phase while something hits that is not on the data path."""


@dataclass
class Moment:
    """Where a cell's fault hits."""

    arena: Arena
    cell: Cell
    victim: str
    gate: Gate | None = None  # the victim's
    observers: list[Gate] = field(default_factory=list)  # of others who hold the streams, the spare, or a view
    spare: Spare | None = None
    other: str | None = None  # whose recovery, or drain, is under way

    @property
    def in_spare(self) -> bool:
        """Whether the spare is the victim."""
        return self.spare is not None and self.spare.server_id == self.victim

    @property
    def relay(self) -> Relay:
        """In front of the victim, or between a spare and the coordinator."""
        return self.spare.relay if self.spare is not None and self.in_spare else self.arena.relays[self.victim]

    @property
    def reached_by_streams(self) -> list[Gate]:
        """Gates to which streams come by themselves."""
        own = self.gate if self.cell.who != "coordinator" else None
        return [gate for gate in (*self.observers, own) if gate is not None]

    def wait_reached(self, stack: ExitStack) -> None:
        """Until the streams, or the spare, have got there."""
        for observer in self.observers:
            observer.wait_fired()
        if self.gate is not None and self.cell.who == "coordinator":
            stack.enter_context(visiting(self.arena.coordinator))
        if self.gate is not None:
            self.gate.wait_fired()
        if self.cell.when == "draining" and self.cell.who in ON_THE_DATA_PATH:
            self._drain(stack)

    def _drain(self, stack: ExitStack) -> None:
        """The victim, which has streams in its hands; then the fault itself, if the process does that to itself."""
        if self.cell.who == "gateway":
            draining.gateway(self.arena, self.victim)
        elif self.cell.who == "router":
            draining.router(self.arena, self.victim)
        else:
            stack.callback(draining.expert_server(self.arena, self.victim))
        held = self.gate
        if held is not None and self.cell.how in AGENTS_OWN:
            # a server that drains gets no new rows: its last ones are in its hands
            point = "replying" if self.cell.who == "expert server" else held.fields["point"]
            self.gate = self.arena.hub.arm(self.victim, point, self.cell.how, stays=self.cell.how in STAYS)
            held.release()
            self.gate.wait_fired()

    @property
    def pid(self) -> int:
        """The victim's."""
        if self.victim == "etcd":
            return self.arena.etcd.nodes[0].pid
        return self.arena.cluster.launcher.pid if self.victim == "launcher" else self.arena.hub.pid(self.victim)

    def signal(self, number: int) -> None:
        """Send one to the victim."""
        if self.victim == "etcd":
            self.arena.etcd.nodes[0].signal(number)  # killed, it has ended when this returns
        else:
            os.kill(self.pid, number)

    def release(self, *, late: bool = False) -> None:
        """Let those go on who are held; `late`: not the victim."""
        for gate in (*self.observers, None if late else self.gate):
            if gate is not None:
                gate.release()


@contextmanager
def moment(arena: Arena, cell: Cell) -> Iterator[Moment]:
    """Prepare a cell: what has to be dead is dead, the gates are armed. At the end all are let go."""
    with ExitStack() as stack:
        m = Moment(arena, cell, _victim(cell))
        if cell.who == "etcd" or (cell.when == "draining" and cell.who not in ("router", "gateway")):
            draining.wait_spread(arena)
        if cell.when == "recovery":
            if cell.who == "etcd":
                _hold_view(m)
            _kill_another(m, stack)
        if cell.when == "draining" and cell.who not in ON_THE_DATA_PATH:
            m.other = "expert-1"
            load = draining.expert_server(arena, m.other)
            stack.callback(load)
            if cell.who == "etcd":
                _hold_view(m)
                load()
        if cell.how in WHILE_LOADING:
            _start_a_spare(m, stack, "loading")
        elif cell.when in ("joining", "loading"):
            _start_a_spare(m, stack, "asking" if cell.who == "etcd" else cell.when)
        elif cell.when in PHASES:
            _arm(m)
        stack.callback(m.release)
        yield m


def _victim(cell: Cell) -> str:
    if cell.how in CUTS:
        return RELAYED.get(cell.who, cell.who)
    if cell.how == "same address" and cell.who == "expert server":
        return "expert-1"
    return ON_THE_DATA_PATH.get(cell.who, cell.who)


def _start_a_spare(m: Moment, stack: ExitStack, point: str) -> None:
    """It is the victim, or an observer of one that is not on the data path."""
    own = m.cell.who in ON_THE_DATA_PATH
    kind = m.cell.who if own else "expert server"
    skip = 3 if (kind, point) == ("expert server", "loading") else 0  # some experts are there already
    action = m.cell.how if m.cell.how in AGENTS_OWN else "block"
    stays = m.cell.how in STAYS
    gate = m.arena.hub.arm_next(server_id_of(kind), point, action, skip=skip, stays=stays)
    m.spare = stack.enter_context(spare(m.arena, kind))
    if own:
        m.victim, m.gate = m.spare.server_id, gate
    else:
        m.observers.append(gate)


def _hold_view(m: Moment) -> None:
    """The coordinator is held with the next view that it decides in hand: etcd fails before it has that."""
    m.observers.append(m.arena.hub.arm("coordinator", "publishing"))


def _kill_another(m: Moment, stack: ExitStack) -> None:
    """An expert server is dead, and its successor is held back until the cell is over."""
    m.other = "expert-1" if m.victim != "expert-1" else "expert-0"
    hold = m.arena.hub.hold_start(m.other)
    stack.callback(hold.release)
    os.kill(m.arena.hub.pid(m.other), signal.SIGKILL)
    hold.wait_reached()


def _arm(m: Moment) -> None:
    """The gate of a phase, and where that is another process's, the victim's own."""
    cell, hub = m.cell, m.arena.hub
    action = cell.how if cell.how in AGENTS_OWN else "block"
    if (cell.who, cell.when) == ("gateway", "draining"):  # blocked itself, it could not be told
        m.observers = [hub.arm(r, "replying", match={"prefill": False}, skip=2) for r in ROUTERS]
        return
    point, prefill, skip = PHASES[cell.when]
    if cell.who in ON_THE_DATA_PATH:
        own = cell.how in REPLIES and (cell.when != "draining" or cell.how not in AGENTS_OWN)
        point = "replying" if own else point
        action = "block" if cell.when == "draining" else action
        stays = action in STAYS
        m.gate = hub.arm(m.victim, point, action, match={"prefill": prefill}, skip=skip, stays=stays)
        return
    m.observers.append(hub.arm(OBSERVER, point, match={"prefill": prefill}, skip=skip))
    if cell.who == "coordinator" and (cell.when == "reply" or cell.how in REPLIES):
        answers = cell.when == "reply" and cell.how != "wrong shape"
        m.gate = hub.arm("coordinator", "replying" if answers else "publishing", action)
