"""Late dispatches and the hedges that run against them: who still has to write which slot.

An *owner* answers for all its slots. A *hedge* carries some of them to another replica; whichever answers first writes
them, once. When a hedge is first, its slots are closed in the owner; when the owner is, its hedges become *dropped*, as
does an owner of which nothing is left. What is dropped still counts against its server's credit until it is answered.
"""

from __future__ import annotations

import numpy as np

from router.instructions import Counters, Dispatch, Role

BUDGET_SHARE = 0.05
"""Extra rows (hedges and probes) per row dispatched."""
BUDGET_ROWS = 512
"""So many may be saved up."""
NOTHING = np.empty(0, np.int64)


class Budget:
    """The token bucket for extra rows."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._rows, self._seen = float(BUDGET_ROWS), 0

    def take(self, rows: int) -> bool:
        """Whether so many extra rows may be sent now; if so they are spent."""
        dispatched = self._counters.rows
        self._rows = min(BUDGET_ROWS, self._rows + BUDGET_SHARE * (dispatched - self._seen))
        self._seen = dispatched
        if rows > self._rows:
            return False
        self._rows -= rows
        return True


def unhedged(d: Dispatch) -> np.ndarray:
    """The slots, ascending, that wait for this owner alone."""
    slots = d.open_slots()
    if d.hedges:
        slots = slots[~np.isin(slots, np.concatenate([h.slots for h in d.hedges]))]
    return np.sort(slots)


def add_hedge(d: Dispatch, hedge: Dispatch) -> None:
    """`hedge` has been sent for some of the slots of `unhedged`."""
    hedge.role, hedge.original = Role.HEDGE, d
    d.hedges = (*d.hedges, hedge)


def drop(*dispatches: Dispatch) -> None:
    """Others have answered these, or will."""
    for d in dispatches:
        d.role, d.open, d.original, d.hedges = Role.DROPPED, NOTHING, None, ()


def hedge_won(hedge: Dispatch) -> Dispatch | None:
    """A hedge answered first. Returns its original if nothing of that is left to answer; it is dropped then."""
    d = hedge.original
    assert d is not None
    d.hedges = tuple(h for h in d.hedges if h is not hedge)
    pairs = np.arange(len(d.slots)) if d.open is None else d.open
    d.open = pairs[~np.isin(d.slots[pairs], hedge.slots)]
    if len(d.open):
        return None
    drop(d)
    return d


def hedge_lost(hedge: Dispatch, *, died: bool) -> None:
    """A hedge will never be answered: its original goes on alone."""
    d = hedge.original
    assert d is not None
    d.hedges = tuple(h for h in d.hedges if h is not hedge)
    d.deaths += died


def owner_lost(d: Dispatch, *, died: bool) -> tuple[np.ndarray, tuple[Dispatch, ...]]:
    """An owner will never be answered. Returns the slots that nobody computes now, and its hedges, which are owners."""
    slots, hedges = unhedged(d), d.hedges
    for hedge in hedges:
        hedge.role, hedge.original, hedge.deaths = Role.OWNER, None, d.deaths + died
    d.hedges = ()
    return slots, hedges
