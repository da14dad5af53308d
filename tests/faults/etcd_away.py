"""etcd fails: whoever needs it misses it, nothing is published until it is back, and then it serves a newcomer, too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moering.process import incarnation
from moering.protocol import Leave
from tests.faults.arena import Arena
from tests.faults.hub import Gate
from tests.faults.injections import INJECTIONS
from tests.faults.moments import Moment
from tests.integration.cluster import wait_for
from tests.membership_etcd.members import LeasedMember
from tests.moering.cluster import Member


@contextmanager
def away(m: Moment) -> Iterator[None]:
    """From the moment of the cell until the streams have ended, and until it was missed."""
    epoch = m.arena.cluster.status()["epoch"]
    try:
        with INJECTIONS[m.cell.how](m):
            missing = _missing(m)
            yield
            for note in missing:
                note.wait_fired()
            assert m.arena.cluster.status()["epoch"] == epoch, "a view came from nowhere"
    finally:
        if m.cell.how == "SIGKILL":  # whoever runs it starts it again, with its data
            m.arena.etcd.start()
    _wait_office(m.arena)
    _check_serves(m.arena)


def _missing(m: Moment) -> list[Gate]:
    """Fired when etcd has not answered: the coordinator, that publishes what it held; and the spare, that joins."""
    needs = {"method": "kv/txn"} if m.other else {}
    notes = [m.arena.hub.arm("coordinator", "missing", "note", match=needs)]
    return [*notes, *([m.arena.hub.arm(m.spare.server_id, "missing", "note")] if m.spare else [])]


def _wait_office(arena: Arena) -> None:
    """Until the coordinator's lease is renewed, or another election is won: etcd may have let it lapse meanwhile."""
    asked_again = arena.hub.arm("coordinator", "asking", "note", match={"method": "lease/keepalive"}, skip=1)
    asked_again.wait_fired()


def _check_serves(arena: Arena) -> None:
    """A newcomer finds the elected coordinator, and gets a view that was published for it."""
    own = Member("gateway", "newcomer", incarnation(), address="")
    newcomer = LeasedMember(own, arena.membership)
    try:
        wait_for("a newcomer is published", lambda: newcomer.view and "newcomer" in arena.processes())
    finally:
        newcomer.client.close(Leave(own.server_id, own.incarnation))
