"""Runs one cell of the kill matrix against an arena."""

from __future__ import annotations

from contextlib import ExitStack

from tests.faults import etcd_away
from tests.faults.arena import MEMBERS, Arena
from tests.faults.injections import INJECTIONS, ends
from tests.faults.matrix import Cell
from tests.faults.moments import ON_THE_DATA_PATH, PHASES, Moment, moment
from tests.integration.cluster import wait_for
from tests.integration.streams import Stream, Streams


def run(arena: Arena, cell: Cell) -> float:
    """Let the fault hit, check the streams and that everything is whole again. The longest gap of a stream, seconds."""
    before = arena.incarnations()
    assert before.keys() == MEMBERS
    with moment(arena, cell) as m:
        seen = _through(m)
        if _breaks_connections(cell):
            arena.check_broken(seen)
        else:
            arena.check(seen)
        if m.spare is not None:
            _check_spare(m)
    ended = _ended(m)
    wait_for("who has ended is back", lambda: _replaced(arena.incarnations(), before) >= ended)
    arena.wait_whole()
    assert _replaced(arena.incarnations(), before) == ended, "others have been replaced, too"
    return max(s.longest_gap_s for s in seen)


def _through(m: Moment) -> list[Stream]:
    """The streams, with the fault in their middle; idle, or while somebody joins without etcd: they start after it."""
    streams = m.arena.streams() if m.cell.when in PHASES and m.spare is None else None
    with ExitStack() as stack:
        if streams is not None:
            streams = _led_there(m, streams)
        m.wait_reached(stack)
        if m.spare is not None and m.cell.who != "etcd":
            streams = m.arena.streams()
        pid = m.pid
        inject = etcd_away.away if m.cell.who == "etcd" else INJECTIONS[m.cell.how]
        with inject(m):
            if streams is None and m.victim == "gateway-0" and ends(m.cell):
                wait_for("another gateway starts", lambda: m.pid != pid)
                m.arena.wait_online()
            return (streams or m.arena.streams()).finish()


def _led_there(m: Moment, streams: Streams) -> Streams:
    """Streams that are where the fault hits: other ones if these have ended before, as a server that seemed slow once
    gets no rows for a while."""

    def there() -> bool:
        nonlocal streams
        over, held = streams.over, all(gate.fired.is_set() for gate in m.reached_by_streams)
        if over and not held:
            m.arena.check(streams.finish())
            streams = m.arena.streams()
        return held

    wait_for("the streams are where the fault hits", there)
    return streams


def _replaced(now: dict[str, int], before: dict[str, int]) -> set[str]:
    return {i for i in MEMBERS if now.get(i, before[i]) != before[i]}


def _breaks_connections(cell: Cell) -> bool:
    if cell.who != "gateway" or cell.when in ("joining", "idle"):
        return False
    return cell.how == "SIGKILL" or (cell.how, cell.when) == ("SIGTERM", "draining")  # told twice, it ends at once


def _ended(m: Moment) -> set[str]:
    drained = m.cell.when == "draining" and m.cell.who in ON_THE_DATA_PATH
    ended = {m.victim} & MEMBERS if ends(m.cell) or drained else set()
    return ended | ({m.other} if m.other else set())


def _check_spare(m: Moment) -> None:
    """A spare that was hit by an end has ended; every other one joins in the end."""
    assert m.spare is not None
    if m.in_spare and ends(m.cell):
        status = m.spare.wait_ended()
        assert bool(status) == (m.cell.how != "SIGTERM") or status == -15, status
    else:
        wait_for("the spare is online", lambda: m.arena.processes().get(m.spare.server_id, {}).get("state") == "ONLINE")
