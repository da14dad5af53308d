"""What the dispatch state machine tells its shell to do, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
    local_rows: np.ndarray  # uint16 [pairs], index into `rows`
    prefill: bool
    deaths: int
    open: np.ndarray | None = None  # int64, the pairs that still wait for this reply; None: all of them


@dataclass(frozen=True, slots=True)
class Send:
    """Send this dispatch to its server now."""

    dispatch: Dispatch


@dataclass(frozen=True, slots=True)
class Complete:
    """Nothing of this work is outstanding. `missing` slots have no live replica: hold them; else the work is done."""

    work: int
    missing: np.ndarray  # int64, ascending


@dataclass(frozen=True, slots=True)
class Poisoned:
    """These rows of the work were outstanding at `POISON_DEATHS` deaths, each time alone: end their requests."""

    work: int
    rows: np.ndarray


Instruction = Send | Complete | Poisoned


@dataclass
class Counters:
    """What the router reports of its dispatches; all counts since its start."""

    dispatches: int = 0
    rows: int = 0
    dispatches_lost: int = 0
    rows_lost: int = 0
    rows_resent: int = 0
    not_here: int = 0
    stale_replies: int = 0
    servers_lost: int = 0
