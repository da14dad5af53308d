"""What the dispatch state machine tells its shell to do, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np


class Role(Enum):
    """What becomes of the reply to a dispatch."""

    OWNER = "owner"
    """Its slots are its own, save those that a hedge answers first."""
    HEDGE = "hedge"
    """It runs against a late owner for some of that one's slots."""
    PROBE = "probe"
    """It only shows how fast a server is by now: the reply is dropped."""
    DROPPED = "dropped"
    """Others have answered; what the server still owes counts against its credit."""


@dataclass(slots=True, eq=False)
class Dispatch:
    """Slots of one work on their way to one server."""

    seq: int
    work: int
    layer: int
    server: str
    slots: np.ndarray  # int64 [pairs], sorted by expert
    experts: np.ndarray  # int64 [pairs]
    rows: np.ndarray  # int64 [rows], rows of the micro-batch to send, ascending
    pair_rows: np.ndarray  # int64 [pairs], the row of each pair
    prefill: bool
    deaths: int
    distinct_experts: int = 0
    role: Role = Role.OWNER
    open: np.ndarray | None = None  # int64, the pairs that still wait for this reply; None: all of them
    original: Dispatch | None = None  # of a hedge
    hedges: tuple[Dispatch, ...] = ()  # of an owner
    expected_s: float = 0.0  # what it should take
    before_s: float = 0.0  # and what its server had to do before, when it was sent
    sent_s: float = float("inf")
    due_s: float = float("inf")  # late after this

    @property
    def wanted(self) -> bool:
        """Whether any slot waits for this reply."""
        return self.open is None or len(self.open) > 0

    def local_rows(self) -> np.ndarray:
        """The row of each pair as an index into `rows`: uint16 [pairs], little-endian."""
        return self.rows.searchsorted(self.pair_rows).astype("<u2")

    def open_slots(self) -> np.ndarray:
        """The slots that wait for this reply."""
        return self.slots if self.open is None else self.slots[self.open]


@dataclass(frozen=True, slots=True)
class Send:
    """Send this dispatch to its server now."""

    dispatch: Dispatch


@dataclass(frozen=True, slots=True)
class Complete:
    """Nothing of this work is outstanding. `missing` slots have no live replica: hold them; else the work is done."""

    work: int
    missing: np.ndarray  # int64, ascending
    deaths: np.ndarray  # int64, of each missing slot: at how many deaths its row was outstanding


@dataclass(frozen=True, slots=True)
class Poisoned:
    """These rows of the work were outstanding at `POISON_DEATHS` deaths, each time alone: end their requests."""

    work: int
    rows: np.ndarray


Instruction = Send | Complete | Poisoned


@dataclass
class Counters:
    """What the router reports of its dispatches; all counts since its start."""

    dispatches: int = 0  # without hedges and probes
    rows: int = 0
    dispatches_lost: int = 0
    rows_lost: int = 0
    rows_resent: int = 0
    not_here: int = 0
    stale_replies: int = 0
    servers_lost: int = 0
    servers_late: int = 0  # times that a server was found late
    servers_ejected: int = 0  # times that one was found slow
    hedges: int = 0
    hedged_rows: int = 0
    hedges_won: int = 0  # faster than what they were sent against
    dropped_rows: int = 0  # of replies that others were faster with
    probes: int = 0
    probe_rows: int = 0
