"""The dispatch state machine: which rows go to which expert server, and what happens when one does not answer.

No socket, no clock, no torch: events come in with the time as an argument, instructions come out. The same code runs in
the router, in unit tests for every order of events, and in the simulation of a cluster.

A *work* is one MoE layer of one micro-batch. Its *slots* number the (row, top-k position) pairs: slot = row × k + j.
Every slot belongs to exactly one outstanding `Dispatch` until its reply arrives. When a server is lost, only the slots
that were outstanding there are sent again; a forward pass is never restarted. A dispatch's `seq` is never used again,
so that a late reply of a lost server meets nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from moering.errors import ProtocolError
from moering.protocol import View
from router.choose import Health, choose, rank_all
from router.instructions import Complete, Counters, Dispatch, Instruction, Poisoned, Send

QUARANTINE_DEATHS, POISON_DEATHS = 2, 3
"""Rows outstanding at two deaths may be their cause: they go on alone, and in halves at each further death. A lone row
outstanding at three deaths is ended with an error, so that it kills no more."""


@dataclass(slots=True)
class _Work:
    layer: int
    top_k: int
    prefill: bool
    experts: np.ndarray  # int64 [rows × k]: the expert of each slot
    outstanding: int = 0
    missing: list[np.ndarray] = field(default_factory=list)


@dataclass(slots=True)
class _Queue:
    """What one server owes us, and what waits until it owes less."""

    credit_rows: int
    max_rows: int
    outstanding_rows: int = 0
    waiting: deque[Dispatch] = field(default_factory=deque)

    def fits(self, d: Dispatch) -> bool:
        """A server that owes nothing takes any dispatch."""
        return not self.outstanding_rows or self.outstanding_rows + len(d.rows) <= self.credit_rows


class Dispatcher:
    """See the module. All methods return the instructions to carry out, in order."""

    def __init__(self) -> None:
        self.counters = Counters()
        self.due_s = float("inf")  # when `tick` has something to judge
        self.health: dict[str, Health] = {}
        self._queues: dict[str, _Queue] = {}
        self._outstanding: dict[int, Dispatch] = {}
        self._works: dict[int, _Work] = {}
        self._servers: list[str] = []
        self._routing = np.full((0, 0, 1), -1, np.int16)
        self._absent = np.zeros((0, 0, 1), bool)
        self._route = np.full((0, 0), -1, np.int16)
        self._route_valid_until_s = 0.0
        self._next_seq = 0
        self._quarantine: deque[tuple[int, np.ndarray, int]] = deque()  # work, slots, deaths
        self._suspects: set[int] = set()  # outstanding dispatches out of the quarantine

    # --- work ---

    def submit(
        self, work: int, layer: int, topk_ids: np.ndarray, slots: np.ndarray | None, prefill: bool, now_s: float
    ) -> list[Instruction]:
        """Start a work: `topk_ids` int64 [rows, k]; `slots` restricts it to those slots (what was missing before)."""
        experts = topk_ids.reshape(-1)
        self._works[work] = _Work(layer, topk_ids.shape[1], prefill, experts)
        todo = np.arange(len(experts)) if slots is None else slots
        return self._send(work, todo, 0, now_s) + self._completed(work)

    def outstanding_at(self, server: str) -> list[Dispatch]:
        """The dispatches that this server has not answered."""
        return [d for d in self._outstanding.values() if d.server == server]

    # --- events ---

    def find(self, server: str, incarnation: int, seq: int, pairs: int) -> Dispatch | None:
        """The dispatch that a reply answers; None, and counted, for a reply to be dropped.

        Raises `ProtocolError` for an answer with too few or too many rows: waiting for the right one would be for ever.
        """
        d = self._outstanding.get(seq)
        if d is None or d.server != server or self.health[server].incarnation != incarnation:
            self.counters.stale_replies += 1
            return None
        if len(d.slots) != pairs:
            raise ProtocolError(f"{pairs} rows where {len(d.slots)} were asked for")
        return d

    def replied(self, dispatch: Dispatch, now_s: float) -> list[Instruction]:
        """The rows of a reply that `find` accepted are in place."""
        del self._outstanding[dispatch.seq]
        self.health[dispatch.server].answered()
        self._suspects.discard(dispatch.seq)
        self._works[dispatch.work].outstanding -= 1
        return self._settle(dispatch) + self._completed(dispatch.work) + self._release_suspect(now_s)

    def not_here(self, server: str, incarnation: int, seq: int, now_s: float) -> list[Instruction]:
        """The server lacks experts of that dispatch: look again, without those replicas until the next plan."""
        d = self._outstanding.get(seq)
        if d is None or d.server != server or self.health[server].incarnation != incarnation:
            self.counters.stale_replies += 1
            return []
        del self._outstanding[seq]
        self.counters.not_here += 1
        if server in self._servers:
            index = self._servers.index(server)
            self._absent[d.layer, d.experts] |= self._routing[d.layer, d.experts] == index
        self._route_valid_until_s = 0.0
        return self._settle(d) + self._resend([d], now_s, died=False)

    def connected(self, server: str, incarnation: int, credit_rows: int, max_rows: int, now_s: float) -> None:
        """A server welcomed us and may be used."""
        self.health.setdefault(server, Health()).came_back(incarnation)
        self._queues[server] = _Queue(credit_rows, max_rows)
        self._route_valid_until_s = 0.0

    def disconnected(self, server: str, now_s: float) -> list[Instruction]:
        """The connection is lost: send again what was outstanding there, and nothing else."""
        health = self.health.get(server)
        if health is None or not health.connected:
            return []
        health.lost(now_s)
        self._route_valid_until_s = 0.0
        lost = self.outstanding_at(server)
        waiting = {d.seq for d in self._queues.pop(server).waiting}
        for d in lost:
            del self._outstanding[d.seq]
        sent = [d for d in lost if d.seq not in waiting]
        self.counters.servers_lost += 1
        self.counters.dispatches_lost += len(sent)
        self.counters.rows_lost += sum(len(d.rows) for d in sent)
        queued = [d for d in lost if d.seq in waiting]
        return self._resend(sent, now_s, died=True) + self._resend(queued, now_s, died=False)

    def tick(self, now_s: float) -> list[Instruction]:
        """Judge what is late. Call it when `due_s` has come and everything that has arrived was taken in."""
        self.due_s = float("inf")
        return []

    def view_changed(self, view: View, now_s: float) -> None:
        """Route by a newer plan from now on. What is outstanding stays where it is: old replicas answer still."""
        shape = (view.layers, view.experts, view.width)
        self._routing = np.frombuffer(view.routing, "<i2").reshape(shape)
        self._absent = np.zeros(shape, bool)
        self._servers = list(view.servers)
        self._route_valid_until_s = 0.0

    def routable(self, layer: int, experts: np.ndarray, now_s: float) -> np.ndarray:
        """Which of these experts of a layer have a live replica now: bool [n]."""
        return self._routes(now_s)[layer, experts] >= 0

    # --- the inside ---

    def _routes(self, now_s: float) -> np.ndarray:
        if now_s >= self._route_valid_until_s:
            self._route = choose(self._routing, self._absent, rank_all(self._servers, self.health, now_s))
            bans = [h.banned_until_s for h in self.health.values() if h.banned_until_s > now_s]
            self._route_valid_until_s = min(bans, default=float("inf"))
        return self._route

    def _send(self, work: int, slots: np.ndarray, deaths: int, now_s: float) -> list[Instruction]:
        """Dispatch these slots of a work to the servers of their experts; those without one become `missing`."""
        w = self._works[work]
        experts = w.experts[slots]
        servers = self._routes(now_s)[w.layer, experts].astype(np.int64)
        order = (servers * len(self._route[w.layer]) + experts).argsort(kind="stable")  # by server, then expert
        slots, experts, servers = slots[order], experts[order], servers[order]
        starts = [0, *(np.flatnonzero(servers[1:] != servers[:-1]) + 1).tolist(), len(servers)]
        instructions: list[Instruction] = []
        for start, end in pairwise(starts):
            if start == end:
                continue
            server = int(servers[start])
            if server < 0:
                w.missing.append(slots[start:end])
            else:
                name = self._servers[server]
                instructions += self._pack(work, w, name, slots[start:end], experts[start:end], deaths)
        return instructions

    def _pack(
        self, work: int, w: _Work, server: str, slots: np.ndarray, experts: np.ndarray, deaths: int
    ) -> list[Instruction]:
        """One dispatch, or several when the server takes fewer pairs at once."""
        queue = self._queues[server]
        instructions: list[Instruction] = []
        for at in range(0, len(slots), queue.max_rows):
            part, chosen = slots[at : at + queue.max_rows], experts[at : at + queue.max_rows]
            rows, local = _rows_of(part // w.top_k)
            self._next_seq += 1
            d = Dispatch(self._next_seq, work, w.layer, server, part, chosen, rows, local, w.prefill, deaths)
            self._outstanding[d.seq] = d
            w.outstanding += 1
            if queue.fits(d):
                instructions.append(self._charge(queue, d))
            else:
                queue.waiting.append(d)
        return instructions

    def _charge(self, queue: _Queue, d: Dispatch) -> Send:
        queue.outstanding_rows += len(d.rows)
        self.counters.dispatches += 1
        self.counters.rows += len(d.rows)
        return Send(d)

    def _settle(self, d: Dispatch) -> list[Instruction]:
        """The server owes us this dispatch no more: what waited for its credit may go."""
        queue = self._queues.get(d.server)
        if queue is None:
            return []
        queue.outstanding_rows -= len(d.rows)
        instructions: list[Instruction] = []
        while queue.waiting and queue.fits(queue.waiting[0]):
            instructions.append(self._charge(queue, queue.waiting.popleft()))
        return instructions

    def _resend(self, lost: Iterable[Dispatch], now_s: float, *, died: bool) -> list[Instruction]:
        instructions: list[Instruction] = []
        for d in lost:
            w = self._works[d.work]
            w.outstanding -= 1
            alone = d.seq in self._suspects
            self._suspects.discard(d.seq)
            deaths = d.deaths + died
            if died and alone and len(d.rows) == 1 and deaths >= POISON_DEATHS:
                instructions.append(Poisoned(d.work, d.rows))
            else:
                self.counters.rows_resent += len(d.rows) * died
                if deaths < QUARANTINE_DEATHS:
                    instructions += self._send(d.work, np.sort(d.slots), deaths, now_s)
                else:
                    self._isolate(d, w, deaths, halve=died)
            instructions += self._completed(d.work)
        return instructions + self._release_suspect(now_s)

    def _isolate(self, d: Dispatch, w: _Work, deaths: int, *, halve: bool) -> None:
        """Put rows that may be poisonous into quarantine, in halves that go on one after the other."""
        slots = np.sort(d.slots)
        middle = d.rows[len(d.rows) // 2] if halve else d.rows[0]
        first = slots // w.top_k < middle
        for part in (slots[~first], slots[first]):  # the first half in front
            if len(part):
                w.outstanding += 1
                self._quarantine.appendleft((d.work, part, deaths))

    def _release_suspect(self, now_s: float) -> list[Instruction]:
        """Send the next of the quarantined rows, unless some are out already: only one may be near the next death."""
        instructions: list[Instruction] = []
        while self._quarantine and not self._suspects:
            work, slots, deaths = self._quarantine.popleft()
            self._works[work].outstanding -= 1
            first = self._next_seq + 1
            instructions += self._send(work, slots, deaths, now_s) + self._completed(work)
            self._suspects = set(range(first, self._next_seq + 1))
        return instructions

    def _completed(self, work: int) -> list[Instruction]:
        w = self._works.get(work)
        if w is None or w.outstanding:
            return []
        del self._works[work]
        missing = np.sort(np.concatenate(w.missing)) if w.missing else np.empty(0, np.int64)
        return [Complete(work, missing)]


def _rows_of(pair_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows, ascending, and for each pair the index of its row among them (uint16)."""
    seen = np.zeros(int(pair_rows.max()) + 1, bool)
    seen[pair_rows] = True
    return np.flatnonzero(seen), (seen.cumsum() - 1)[pair_rows].astype("<u2")
