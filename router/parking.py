"""Rows whose experts have no live replica: they wait, fail or go on without, as their request's policy says.

A flight that meets such an expert is split: sequences that wait are *parked* here, all others go on at once. What is
parked is sent again whenever routes were gained, and fails after a time limit.

While a server of the plan has yet to answer this router's first hello, nothing is decided but to wait: a router that
has just started must not fail requests, or drop experts, because it does not know anybody yet.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from router.exchange import Exchange
from router.flight import Flight
from router.sequence import Sequence, Status

logger = logging.getLogger(__name__)

NONE = np.empty(0, np.int64)
GONE = "an expert that it needs has no live replica"
ALL_GONE = "all experts of one of its tokens are without a live replica"
TOO_LATE = "no live replica of an expert that it needs came back in time"


class Parking:
    """Used by the engine's thread only. Methods that return flights return those that go on from the layer they are at.

    `fail` ends a request with (sequence, message), once; `drop` frees the rows of a flight that nobody waits for.
    """

    def __init__(
        self,
        exchange: Exchange,
        timeout_s: float,
        fail: Callable[[Sequence, str], None],
        drop: Callable[[Flight], None],
    ) -> None:
        self.flights: set[Flight] = set()
        self._exchange, self._timeout_s = exchange, timeout_s
        self._fail, self._drop = fail, drop

    def park(self, flight: Flight, missing: np.ndarray, deaths: np.ndarray, now_s: float) -> Flight | None:
        """`missing` slots of this flight have no live replica. Returns the rows that need not wait, if any."""
        flight.missing, flight.missing_deaths, flight.was_parked = missing, deaths, True
        flight.expert_rows.keep()  # it may wait for long, and servers have few slots for answers
        if flight.waits_since_s is None:
            flight.waits_since_s = now_s
            requests = len(flight.sequences_of(flight.missing_rows))
            logger.warning("layer %d: no live replica for rows of %d requests", flight.layer, requests)
        return self._sort(flight)

    def look(self, now_s: float) -> list[Flight]:
        """Fail what has waited for too long, and apply the policies to the rest."""
        going_on = []
        for flight in list(self.flights):
            since_s = flight.waits_since_s
            if since_s is not None and now_s - since_s > self._timeout_s:
                for sequence in flight.sequences:
                    self._fail(sequence, TOO_LATE)
            self.flights.discard(flight)
            going_on.append(self._sort(flight))
        return [flight for flight in going_on if flight is not None]

    def retry(self) -> list[Flight]:
        """The routes have changed: what is to be sent again, each flight's `missing` slots."""
        parked, self.flights = self.flights, set()
        return [flight for flight in parked if not self._dropped(flight)]

    def _sort(self, flight: Flight) -> Flight | None:
        """Do what each policy says, keep the rows that wait, and return the rest."""
        if self._exchange.routable(flight.layer, flight.topk_ids.reshape(-1)[flight.missing]):
            self._exchange.changed = True  # a replica came back while other rows of this flight were under way
        elif not self._exchange.settling:
            self._apply_policies(flight)
        waiting = flight.sequences_of(flight.missing_rows)
        rest = [s for s in flight.sequences if s not in waiting]
        parked = flight.split(waiting, flight.missing) if waiting and rest else flight
        if waiting and not self._dropped(parked):
            self.flights.add(parked)
        if not rest:
            return None
        return flight.split(rest, NONE) if waiting else flight

    def _apply_policies(self, flight: Flight) -> None:
        policies = [s.sampling.on_missing_expert for s in flight.sequences]
        for sequence in flight.sequences_of(flight.missing_rows):
            if sequence.sampling.on_missing_expert == "fail":
                self._fail(sequence, GONE)
        if "renormalize" not in policies:
            return
        for sequence in flight.sequences_of(flight.hopeless_rows()):
            if sequence.sampling.on_missing_expert == "renormalize":
                self._fail(sequence, ALL_GONE)
        flight.leave_out([s for s in flight.sequences if _renormalizes(s)])

    def _dropped(self, flight: Flight) -> bool:
        """Whether nobody waited for this flight any more."""
        dead = all(s.status is Status.FINISHED for s in flight.sequences)
        if dead:
            self._drop(flight)
        return dead


def _renormalizes(sequence: Sequence) -> bool:
    return sequence.sampling.on_missing_expert == "renormalize" and sequence.status is not Status.FINISHED
