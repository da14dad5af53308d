"""The cells in which the launcher ends, and the cluster with it: what its clients see, and that nothing is left."""

from __future__ import annotations

import signal
from contextlib import ExitStack

import psutil

from tests.faults.arena import Arena
from tests.faults.matrix import Cell
from tests.faults.moments import PHASES, Moment, moment
from tests.integration.cluster import DEADLINE_S, wait_for
from tests.integration.streams import Streams

NUMBERS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM}


def concerns(cell: Cell) -> bool:
    """Whether a cell is one of these: its arena is gone afterwards."""
    return cell.who == "launcher" and cell.how in NUMBERS


def run(arena: Arena, cell: Cell) -> float:
    """Let it end in its moment. The longest gap of a stream, seconds."""
    launcher = arena.cluster.launcher
    with moment(arena, cell) as m:
        with ExitStack() as stack:
            streams = _under_way(m, stack)
            children = psutil.Process(launcher.pid).children(recursive=True)
            m.signal(NUMBERS[cell.how])
            m.release()
            seen = streams.finish() if streams is not None else []
        if seen and cell.how == "SIGKILL":
            arena.check_broken(seen)
        elif seen:  # an orderly stop: who streams is served to the end
            arena.check(seen)
        if cell.how == "SIGTERM":
            assert launcher.wait(DEADLINE_S) == 0
    wait_for("all processes are gone", lambda: not any(map(runs, children)))
    return max((s.longest_gap_s for s in seen), default=0.0)


def _under_way(m: Moment, stack: ExitStack) -> Streams | None:
    """The streams in the moment; none when it is *idle*."""
    streams = m.arena.streams() if m.cell.when in PHASES else None
    m.wait_reached(stack)
    if m.spare is not None:
        streams = m.arena.streams()
        streams.wait_tokens(1)
    return streams


def runs(process: psutil.Process) -> bool:
    """A zombie is dead: in a container there may be nobody who reaps it."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
