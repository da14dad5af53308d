"""The dispatch state machine: which rows go to which expert server, and what happens when one does not answer.

No socket, no clock, no torch: events come in with the time as an argument, instructions come out. The same code runs in
the router, in unit tests for every order of events, and in the simulation of a cluster.

A *work* is one MoE layer of one micro-batch. Its *slots* number the (row, top-k position) pairs: slot = row × k + j.
Every slot belongs to exactly one outstanding `Dispatch` until its reply arrives; a late one may be raced by a hedge
(`router.race`). When a server is lost, only the slots that were outstanding there are sent again; a forward pass is
never restarted. A dispatch's `seq` is never used again, so that a late reply of a lost server meets nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from moering.errors import ProtocolError
from moering.protocol import View
from router import race
from router.balance import Balance
from router.health import Health
from router.instructions import Complete, Counters, Dispatch, Instruction, Poisoned, Role
from router.outbox import Outbox
from router.packing import Packet, split
from router.quarantine import POISON_DEATHS, QUARANTINE_DEATHS, Part, Quarantine
from router.routes import Routes
from router.watch import Watch
from router.work import Work

REPLACED_LATELY_S = 120.0


class Dispatcher:
    """See the module. All methods return the instructions to carry out, in order."""

    def __init__(self) -> None:
        self.counters = Counters()
        self._replaced_at_s: list[float] = []
        self.balance = Balance()
        self.routes = Routes()
        self.health = self.routes.health
        self.outbox = Outbox(self.counters)
        self.works: dict[int, Work] = {}
        self._next_seq = 0
        self._quarantine = Quarantine()
        self._watch = Watch(self)

    # --- work ---

    def submit(
        self,
        work: int,
        layer: int,
        topk_ids: np.ndarray,
        slots: np.ndarray | None,
        prefill: bool,
        now_s: float,
        deaths: np.ndarray | None = None,
    ) -> list[Instruction]:
        """Start a work: `topk_ids` int64 [rows, k]; `slots` restricts it to those slots (what was missing before).

        `deaths` are those of the slots, as `Complete` told them: else a row that has killed all holders of an expert
        would begin anew when they are back.
        """
        self.works[work] = w = Work(layer, topk_ids.shape[1], prefill, topk_ids.reshape(-1))
        if slots is None or deaths is None or not deaths.any():
            instructions = self._send(work, slots, 0, now_s)
        else:
            w.resumed = True
            instructions = self._resume(work, w, slots, deaths, now_s)
        if now_s >= self._watch.probe_at_s:
            instructions += self._watch.probe(work, now_s)
        return instructions + self._completed(work)

    def outstanding_at(self, server: str) -> list[Dispatch]:
        """The dispatches that this server has not answered."""
        return self.outbox.at(server)

    @property
    def due_s(self) -> float:
        """When `tick` should be called next; infinity: never, as things are."""
        return self.outbox.due_s

    # --- events ---

    def find(self, server: str, incarnation: int, seq: int, pairs: int) -> Dispatch | None:
        """The dispatch that a reply answers; None, and counted, for a reply to be dropped.

        The rows of its open pairs are to be written to their slots, then `replied` is to be called. Raises
        `ProtocolError` for an answer with too few or too many rows: waiting for the right one would be for ever.
        """
        d = self.outbox.unanswered.get(seq)
        if d is None or d.server != server or self.health[server].incarnation != incarnation:
            self.counters.stale_replies += 1
            return None
        if len(d.slots) != pairs:
            raise ProtocolError(f"{pairs} rows where {len(d.slots)} were asked for")
        return d

    def replied(self, dispatch: Dispatch, now_s: float) -> list[Instruction]:
        """The open rows of a reply that `find` accepted are in place."""
        d, health = dispatch, self.health[dispatch.server]
        health.answered(now_s <= d.due_s, now_s)
        instructions = self.outbox.answered(d, now_s)
        if d.role is Role.OWNER:
            if d.hedges:
                race.drop(*d.hedges)
            instructions += self._done(d, now_s)
        elif d.role is Role.HEDGE:
            self.counters.hedges_won += 1
            original = race.hedge_won(d)
            if original is not None:
                instructions += self._done(original, now_s)
        elif d.role is Role.DROPPED:
            self.counters.dropped_rows += len(d.rows)
        else:
            self._watch.probed(d, now_s)
        if health.late:
            self._watch.look_whether_late(d.server, now_s)
        return instructions

    def not_here(self, server: str, incarnation: int, seq: int, now_s: float) -> list[Instruction]:
        """The server lacks experts of that dispatch: look again, without those replicas until the next plan."""
        d = self.outbox.unanswered.get(seq)
        if d is None or d.server != server or self.health[server].incarnation != incarnation:
            self.counters.stale_replies += 1
            return []
        del self.outbox.unanswered[seq]
        self.counters.not_here += 1
        self.routes.lacks(server, d.layer, d.experts)
        if d.role is Role.PROBE:
            self._watch.probe_lost(d, now_s)
        return self.outbox.settle(d, now_s) + self.lose([d], now_s, died=False)

    def connected(self, server: str, incarnation: int, credit_rows: int, max_rows: int, now_s: float) -> None:
        """A server welcomed us and may be used."""
        health = self.health.setdefault(server, Health())
        if health.incarnation not in (0, incarnation):
            self._replaced_at_s.append(now_s)
        health.came_back(incarnation)
        self.outbox.open(server, credit_rows, max_rows)
        self._watch.health_changed()

    def disconnected(self, server: str, now_s: float) -> list[Instruction]:
        """The connection is lost: send again what was outstanding there, and nothing else."""
        health = self.health.get(server)
        if health is None or not health.connected:
            return []
        health.lost(now_s)
        self._watch.health_changed()
        self.counters.servers_lost += 1
        sent, waiting = self.outbox.close(server)
        return self.lose(sent, now_s, died=True) + self.lose(waiting, now_s, died=False)

    def view_changed(self, view: View, now_s: float) -> None:
        """Route by a newer plan from now on. What is outstanding stays where it is: old replicas answer still."""
        self.routes.follow(view)
        if view.layers:
            self.balance.reshape(view.layers, view.experts)

    def tick(self, now_s: float) -> list[Instruction]:
        """Judge who is late or slow. Call it when `due_s` has come and everything that has arrived was taken in."""
        return self._watch.tick(now_s)

    def routable(self, layer: int, experts: np.ndarray, now_s: float) -> np.ndarray:
        """Which of these experts of a layer have a live replica now: bool [n]."""
        routes = self.routes.now(now_s)
        return routes[layer, experts] >= 0 if len(routes) else np.zeros(len(experts), bool)

    def load_balance(self) -> tuple[list[float], list[float]]:
        """Max/mean of late, by layer, of the rows of each expert and of those of each server. Call it every second."""
        return self.balance.report(self.routes.in_use)

    # --- the inside, also for `Watch` ---

    def _send(self, work: int, slots: np.ndarray | None, deaths: int, now_s: float) -> list[Instruction]:
        """Dispatch these slots of a work to the servers of their experts; those without one become `missing`."""
        w = self.works[work]
        if not len(self.routes.now(now_s)):  # no plan yet: a gateway heard of us before we of the plan
            w.miss(np.arange(len(w.experts)) if slots is None else slots, deaths)
            return []
        instructions: list[Instruction] = []
        for packet in self.routes.packets(w, slots, now_s):
            if packet.server < 0:
                w.miss(packet.slots, deaths)
                continue
            for d in self.make(work, packet, Role.OWNER, deaths):
                w.outstanding += 1
                self.balance.sent(d.server, w.layer, len(d.slots))
                instructions += self.outbox.give(d, now_s)
        return instructions

    def make(self, work: int, packet: Packet, role: Role, deaths: int) -> list[Dispatch]:
        """One dispatch, or several when the server takes fewer pairs at once."""
        w, server = self.works[work], self.routes.servers[packet.server]
        dispatches = []
        for p in split(packet, self.outbox.queues[server].max_pairs, w.top_k):
            self._next_seq += 1
            dispatches.append(
                Dispatch(
                    self._next_seq, work, w.layer, server, p.slots, p.experts, p.rows, p.pair_rows, w.prefill, deaths,
                    p.distinct_experts, role,
                )
            )  # fmt: skip
        return dispatches

    def lose(self, lost: Iterable[Dispatch], now_s: float, *, died: bool) -> list[Instruction]:
        """These will never be answered."""
        instructions: list[Instruction] = []
        for d in lost:
            if d.role is Role.HEDGE:
                race.hedge_lost(d, died=died)
            elif d.role is Role.OWNER:
                slots, hedges = race.owner_lost(d, died=died)
                self.works[d.work].outstanding += len(hedges) - 1
                alone = self._quarantine.passed_on(d.seq, [h.seq for h in hedges])
                if len(slots):
                    self.counters.dispatches_lost += died
                    instructions += self._again(d, slots, d.deaths + died, now_s, died=died, alone=alone)
                instructions += self._completed(d.work)
        return instructions + self._release(now_s)

    def write_off(self, d: Dispatch, slots: np.ndarray, deaths: int, now_s: float) -> list[Instruction]:
        """An owner and its hedges, though not lost, are counted as outstanding at so many deaths; drop them before."""
        self.works[d.work].outstanding -= 1
        alone = self._quarantine.passed_on(d.seq, [])
        instructions = self._again(d, slots, deaths, now_s, died=True, alone=alone)
        return instructions + self._completed(d.work) + self._release(now_s)

    def _again(
        self, d: Dispatch, slots: np.ndarray, deaths: int, now_s: float, *, died: bool, alone: bool
    ) -> list[Instruction]:
        """Send slots of a lost dispatch to others, or into quarantine."""
        w = self.works[d.work]
        rows = np.unique(slots // w.top_k)
        self.counters.rows_lost += len(rows) * died
        convicted = not w.resumed or self._replaced(now_s) >= QUARANTINE_DEATHS
        if died and alone and len(rows) == 1 and deaths >= POISON_DEATHS and convicted:
            return [Poisoned(d.work, rows)]
        self.counters.rows_resent += len(rows) * died
        if deaths < QUARANTINE_DEATHS:
            return self._send(d.work, slots, deaths, now_s)
        w.outstanding += self._quarantine.add(Part(d.work, slots, deaths), w.top_k, halve=died)
        return []

    def _replaced(self, now_s: float) -> int:
        """How many servers came back lately as new processes. A row that nobody could serve has seen all connections
        break, which a network does too: it is ended only where processes really died."""
        self._replaced_at_s = [s for s in self._replaced_at_s if now_s - s < REPLACED_LATELY_S]
        return len(self._replaced_at_s)

    def _resume(self, work: int, w: Work, slots: np.ndarray, deaths: np.ndarray, now_s: float) -> list[Instruction]:
        """What was missing goes on as what it was suspected of: row by row, since the halves were not kept."""
        rows, which = np.unique(slots // w.top_k, return_inverse=True)
        worst = np.zeros(len(rows), np.int64)
        np.maximum.at(worst, which, deaths)  # what kills is the row, with whatever expert
        instructions: list[Instruction] = []
        for n in range(QUARANTINE_DEATHS):
            if (mine := worst[which] == n).any():
                instructions += self._send(work, slots[mine], n, now_s)
        for i in np.flatnonzero(worst >= QUARANTINE_DEATHS)[::-1].tolist():  # the last one put in is the first to go
            part = Part(work, slots[which == i], int(worst[i]))
            w.outstanding += self._quarantine.add(part, w.top_k, halve=False)
        return instructions + self._release(now_s)

    def _release(self, now_s: float) -> list[Instruction]:
        """Send the next of the quarantined rows, when it is their turn."""
        instructions: list[Instruction] = []
        while (part := self._quarantine.release()) is not None:
            self.works[part.work].outstanding -= 1
            first = self._next_seq + 1
            instructions += self._send(part.work, part.slots, part.deaths, now_s) + self._completed(part.work)
            self._quarantine.out = set(range(first, self._next_seq + 1))
        return instructions

    def _done(self, owner: Dispatch, now_s: float) -> list[Instruction]:
        """All slots of an owner are answered."""
        self.works[owner.work].outstanding -= 1
        self._quarantine.passed_on(owner.seq, [])
        return self._completed(owner.work) + self._release(now_s)

    def _completed(self, work: int) -> list[Instruction]:
        w = self.works.get(work)
        if w is None or w.outstanding:
            return []
        del self.works[work]
        return [Complete(work, *w.missed())]
