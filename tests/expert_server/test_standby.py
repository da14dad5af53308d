"""Host memory holds what the plan would give this server next."""

from types import SimpleNamespace

import pytest

from expert_server.standby import choose, refill
from moering.protocol import View
from moering.ring import Member, plan
from tests.plans import held_by

LAYERS, EXPERTS, SERVERS = 2, 16, "abcd"


def view_of(made):
    target = made.replicas.astype("<i2").tobytes()
    return View(
        1, 1, [], list(made.servers), LAYERS, EXPERTS, made.replicas.shape[2], target, target, 2, 1, 0, 0
    )  # fmt: skip


@pytest.fixture(scope="module")
def planned():
    return plan(None, [Member(s, 64) for s in SERVERS], None, 2, layers=LAYERS, experts=EXPERTS)


class Replicas:
    def __init__(self, capacity):
        self.capacity, self.held = capacity, {}

    def keys(self):
        return set(self.held)

    def keep(self, keys):
        self.held = {key: weights for key, weights in self.held.items() if key in keys}

    def put(self, key, weights):
        assert len(self.held) < self.capacity
        self.held[key] = weights


def test_nothing_that_is_held_already_and_no_more_than_there_is_room(planned):
    everything = choose(view_of(planned), "a", 1000)
    assert set(everything) | set(held_by(planned, "a")) == {(x, e) for x in range(LAYERS) for e in range(EXPERTS)}
    assert not set(everything) & set(held_by(planned, "a"))
    assert choose(view_of(planned), "a", 5) == everything[:5]
    assert choose(view_of(planned), "a", 0) == choose(view_of(planned), "unknown", 5) == []


def test_most_of_what_the_next_plan_asks_for_is_there(planned):
    """After any death, with room for half of what a server does not hold."""
    asked = hits = 0
    for dead in SERVERS:
        after = plan(planned, [Member(s, 64) for s in SERVERS if s != dead], None, 2, layers=LAYERS, experts=EXPERTS)
        for server in after.servers:
            new = set(held_by(after, server)) - set(held_by(planned, server))
            asked += len(new)
            hits += len(new & set(choose(view_of(planned), server, LAYERS * EXPERTS // 4)))
    assert asked > 0
    assert hits / asked > 0.65  # half would be chance


def test_a_newer_view_stops_the_filling_and_the_next_one_goes_on(planned):
    replicas, reads = Replicas(6), []

    def read(layer, expert):
        reads.append((layer, expert))
        return SimpleNamespace(digest=b"")

    view, clock = view_of(planned), lambda: 0.0
    refill(view, "a", replicas, read, lambda took: len(reads) < 2, clock)
    assert reads == choose(view, "a", 6)[:2]
    refill(view, "a", replicas, read, lambda took: True, clock)
    assert reads == choose(view, "a", 6)
    other = Replicas(6)
    other.held = dict.fromkeys(held_by(planned, "a")[:6])  # of an earlier plan
    refill(view, "a", other, read, lambda took: True, clock)
    assert other.keys() == set(choose(view, "a", 6))
