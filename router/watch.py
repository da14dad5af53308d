"""Judges who is late or slow, and what to do about it: hedges, ejection and probes of the dispatch state machine.

Late is a server with an answer overdue (`router.pace`) while another keeps its deadlines: when all stand still the
machine or the network is slow, and nobody is suspected.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from router import race
from router.health import GOOD
from router.instructions import Dispatch, Instruction, Role
from router.packing import pack
from router.quarantine import QUARANTINE_DEATHS

if TYPE_CHECKING:
    from router.dispatch import Dispatcher

logger = logging.getLogger(__name__)

RECHECK_S = 0.01
"""While something is overdue it is looked at so often: who can help may change."""
OWN_PAUSE_S = 0.025
"""A look that comes so much later than it was due says that we stood still, and maybe all others, too: look again."""
PROBE_ROWS = 8


class Watch:
    """Time's part in a `Dispatcher`."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher, self._outbox, self._routes = dispatcher, dispatcher.outbox, dispatcher.routes
        self._health, self._counters = dispatcher.health, dispatcher.counters
        self._budget = race.Budget(dispatcher.counters)
        self._excused = False
        self.probe_at_s = float("inf")  # when the next probe of any server may go

    def tick(self, now_s: float) -> list[Instruction]:
        """See `Dispatcher.tick`."""
        box = self._outbox
        if now_s - box.due_s > OWN_PAUSE_S and not self._excused:
            self._excused, box.due_s = True, now_s + RECHECK_S
            return []
        self._excused = False
        instructions: list[Instruction] = []
        overdue = [d for d in box.overdue(now_s) if d.role is not Role.DROPPED]
        busy = {d.server for d in box.unanswered.values()}
        for d in overdue:
            if self._others_are_well(d, busy):
                instructions += self._found_late(d, now_s)
        if now_s >= box.pace.next_look_s:
            instructions += self._look_for_slow(now_s)
        if overdue:
            box.due_s = min(box.due_s, now_s + RECHECK_S)
        if box.unanswered:
            box.due_s = min(box.due_s, box.pace.next_look_s)
        return instructions

    def health_changed(self) -> None:
        """Choose anew who serves, and whom to probe when."""
        self._routes.changed()
        self.probe_at_s = min((h.probe_at_s for h in self._health.values() if h.may_be_probed), default=float("inf"))

    # --- late ---

    def look_whether_late(self, server: str, now_s: float) -> None:
        """A late server has answered something: is anything else overdue there?"""
        if all(d.due_s > now_s for d in self._outbox.at(server)):
            self._health[server].caught_up(now_s)
            self.health_changed()

    def _others_are_well(self, d: Dispatch, busy: set[str]) -> bool:
        """Whether any keeps its deadlines, and has shown so since `d` was sent if it has anything to do."""
        return any(
            health.well and (server not in busy or health.answered_s > d.sent_s)
            for server, health in self._health.items()
            if server != d.server
        )

    def _found_late(self, d: Dispatch, now_s: float) -> list[Instruction]:
        instructions: list[Instruction] = []
        health = self._health[d.server]
        was_ejected = health.ejected
        if health.overdue(now_s):
            self._counters.servers_late += 1
            if health.ejected and not was_ejected:
                self._counters.servers_ejected += 1
                logger.warning("%s is late again and again: others first, until probes find it better", d.server)
            age_ms, allowed_ms = 1000 * (now_s - d.sent_s), 1000 * (d.due_s - d.sent_s)
            logger.info("%s is late: %.0f ms, %.0f allowed; others first", d.server, age_ms, allowed_ms)
            instructions += self._pass_over(d.server, now_s)
        owner = d.original or d
        if owner.role is Role.OWNER:
            instructions += self._help(owner, now_s)
        return instructions

    def _pass_over(self, server: str, now_s: float) -> list[Instruction]:
        """Use others first, also for what was never sent to it."""
        self.health_changed()
        return self._dispatcher.lose(self._outbox.forget_waiting(server), now_s, died=False)

    def _help(self, d: Dispatch, now_s: float) -> list[Instruction]:
        """Race a late owner by a hedge, or write it off when it may be what stops one server after the other."""
        racers = (d, *d.hedges)
        wedged = [r for r in racers if self._health[r.server].wedged(r.sent_s, now_s)]
        if len(wedged) == len(racers) and d.deaths + len(wedged) >= QUARANTINE_DEATHS:
            return self._write_off(d, len(wedged), now_s)
        if d.deaths and self._health[d.server].answered_s <= d.sent_s:
            return []  # not to a third one before it is clear that this one is wedged
        return self._hedge(d, race.unhedged(d), now_s)

    def _hedge(self, d: Dispatch, slots: np.ndarray, now_s: float) -> list[Instruction]:
        """Send these slots of a late owner to the next replica as well, where it has credit and the budget allows.

        The budget does not bind when the server is wedged: that is no race but a replacement.
        """
        if not len(slots):
            return []
        work, instructions = self._dispatcher.works[d.work], list[Instruction]()
        free = self._health[d.server].wedged(d.sent_s, now_s)
        for packet in pack(slots, work.experts, self._routes.around(d.layer, d.server, now_s), work.top_k):
            if packet.server < 0:
                continue
            for hedge in self._dispatcher.make(d.work, packet, Role.HEDGE, d.deaths):
                if self._outbox.queues[hedge.server].fits(hedge) and (self._budget.take(len(hedge.rows)) or free):
                    race.add_hedge(d, hedge)
                    self._counters.hedges += 1
                    self._counters.hedged_rows += len(hedge.rows)
                    instructions += self._outbox.give(hedge, now_s)
        return instructions

    def _write_off(self, d: Dispatch, wedged: int, now_s: float) -> list[Instruction]:
        """All who have it are wedged: count that as deaths, and go on through the quarantine if anybody is left."""
        work, slots = self._dispatcher.works[d.work], np.sort(d.open_slots())
        route = self._routes.around(d.layer, d.server, now_s)
        if (route[work.experts[slots]] < 0).any():
            return []
        logger.info("%d rows were at %d wedged servers; others get them in parts", len(d.rows), wedged)
        race.drop(*d.hedges, d)
        return self._dispatcher.write_off(d, slots, d.deaths + wedged, now_s)

    # --- slow ---

    def _trusted(self, now_s: float) -> list[str]:
        return [s for s, h in self._health.items() if h.rank(now_s) == GOOD]

    def _look_for_slow(self, now_s: float) -> list[Instruction]:
        instructions: list[Instruction] = []
        pace = self._outbox.pace
        for server in pace.look(self._trusted(now_s), now_s):
            self._health[server].eject(now_s)
            self._counters.servers_ejected += 1
            logger.warning("%s is slow beside its peers: others first, until probes find it better", server)
            instructions += self._pass_over(server, now_s)
        return instructions

    # --- probes ---

    def probe(self, work: int, now_s: float) -> list[Instruction]:
        """Copies of some rows of a work that has just been submitted, for the servers that are due for a probe."""
        instructions: list[Instruction] = []
        w = self._dispatcher.works[work]
        slots = np.arange(min(len(w.experts), PROBE_ROWS * w.top_k))
        for server in self._routes.servers:
            health = self._health.get(server)
            if health is None or not health.wants_probe(now_s):
                continue
            for packet in pack(slots, w.experts, self._routes.only(w.layer, server), w.top_k):
                if packet.server < 0:
                    continue
                (probe, *_) = self._dispatcher.make(work, packet, Role.PROBE, 0)
                if self._outbox.queues[server].fits(probe) and self._budget.take(len(probe.rows)):
                    probe.open = race.NOTHING
                    health.probe_sent()
                    self._counters.probes += 1
                    self._counters.probe_rows += len(probe.rows)
                    instructions += self._outbox.give(probe, now_s)
        self.health_changed()
        return instructions

    def probed(self, d: Dispatch, now_s: float) -> None:
        """A probe was answered.

        Nobody waits for it: the router computes its next layer before it looks again, and the answer may lie there for
        so long. What counts is therefore when an answer of another server was last taken in before.
        """
        health, pace = self._health[d.server], self._outbox.pace
        others_s = max((h.answered_s for s, h in self._health.items() if s != d.server), default=now_s)
        took_s = max(0.0, min(now_s, others_s) - d.sent_s)
        usual = pace.peers_mean(d.server, self._trusted(now_s)) or 1.0
        health.probed(took_s, d.before_s + d.expected_s, usual, now_s)
        if not health.ejected:
            pace.of(d.server).restart()
            logger.info("%s is as fast as its peers again", d.server)
        self.health_changed()

    def probe_lost(self, d: Dispatch, now_s: float) -> None:
        """A probe was refused."""
        self._health[d.server].probe_lost(now_s)
        self.health_changed()
