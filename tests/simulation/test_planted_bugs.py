"""Bugs planted in the real code: the simulation must find each within a bounded number of seeds.

Without this nobody knows whether ten thousand green schedules mean that the code is right or that nobody looked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gateway.journal import Journal
from moering.lease_session import LeaseSession
from moering.placement import Placement
from moering.roster import Roster
from router.dispatch import Dispatcher
from tests.simulation.run import run

Patch = pytest.MonkeyPatch
MAX_SEEDS = 200


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def reply_of_an_old_incarnation(patch: Patch) -> None:
    """The dispatcher does not look at who answers."""
    find = Dispatcher.find
    patch.setattr(
        Dispatcher, "find", lambda s, server, _, seq, n: find(s, server, s.health[server].incarnation, seq, n)
    )


def row_summed_twice(patch: Patch) -> None:
    """The dispatcher takes an answer again that it has taken already, while the rest of the work is under way."""
    find, replied = Dispatcher.find, Dispatcher.replied
    taken: dict[tuple[Dispatcher, int], Any] = {}

    def find_again(self: Dispatcher, server: str, incarnation: int, seq: int, pairs: int) -> Any:
        d = taken.get((self, seq))
        if d is None or d.work not in self.works:
            return find(self, server, incarnation, seq, pairs)
        return d

    def replied_again(self: Dispatcher, d: Any, now_s: float) -> list[Any]:
        if (self, d.seq) in taken:
            return []
        taken[self, d.seq] = d
        return replied(self, d, now_s)

    patch.setattr(Dispatcher, "find", find_again)
    patch.setattr(Dispatcher, "replied", replied_again)


def lease_renewed_by_a_dead_process(patch: Patch) -> None:
    """The coordinator takes a lease by the name alone."""
    patch.setattr(Roster, "known", lambda self, server_id, incarnation: self.records.get(server_id))


def replica_dropped_before_the_routers_know(patch: Patch) -> None:
    """The coordinator waits for nobody's acknowledgement."""
    tables = Placement.tables
    patch.setattr(Placement, "tables", lambda self, acknowledged: tables(self, None))


def plan_of_a_lower_term(patch: Patch) -> None:
    """A member goes by any view that it gets."""
    patch.setattr(LeaseSession, "_take_view", lambda self, view: self._on_view(view))


def rows_of_a_dead_server_forgotten(patch: Patch) -> None:
    """The dispatcher sends nothing again."""
    disconnected = Dispatcher.disconnected
    patch.setattr(Dispatcher, "disconnected", lambda self, server, now_s: disconnected(self, server, now_s) and [])


def token_of_an_old_attempt(patch: Patch) -> None:
    """The gateway takes every token that names its request."""

    def take(self: Journal, token: Any) -> Any:
        record = self._records.get(token.request_id)
        if record is None:
            return None
        record.emitted.append(token.token_id)
        if token.finish_reason is not None:
            self.close(record)
        record.sink(token)
        return record if record.finished else None

    patch.setattr(Journal, "take", take)


BUGS: list[tuple[Callable[[Patch], None], str]] = [
    (reply_of_an_old_incarnation, "took a reply of a dead incarnation"),
    (row_summed_twice, "without failures"),
    (lease_renewed_by_a_dead_process, "a dead process renewed the lease"),
    (replica_dropped_before_the_routers_know, "still routes"),
    (plan_of_a_lower_term, "goes back to"),
    (rows_of_a_dead_server_forgotten, "after the last fault"),
    (token_of_an_old_attempt, "q"),
]


@pytest.mark.parametrize(("plant", "finding"), BUGS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_planted_bug_is_found(plant: Callable[[Patch], None], finding: str, monkeypatch: Patch) -> None:
    plant(monkeypatch)
    for seed in range(MAX_SEEDS):
        failure = run(seed).failure
        if failure:
            assert finding in failure
            return
    pytest.fail(f"not found in {MAX_SEEDS} schedules")
