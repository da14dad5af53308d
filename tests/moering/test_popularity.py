"""What routers counted becomes an order of loading that fits in a byte an expert."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moering.popularity import PRIOR_TOKENS, Popularity, ranks
from tests.moering.cluster import EXPERTS, LAYERS, running


def test_ranks_follow_the_counts_and_start_at_zero() -> None:
    popularity = Popularity(1, 4)
    popularity.add(np.array([0, 100, 10_000, 1e30], "<f4").tobytes(), 0.0)
    assert list(ranks(popularity.tokens(0.0))) == [0, 8, 53, 255]  # eighths of a doubling, as much as a byte holds


def test_an_unknown_popularity_ranks_all_alike() -> None:
    assert set(ranks(Popularity(2, 3).tokens(7.0))) == {0}
    assert set(ranks(np.full((2, 3), PRIOR_TOKENS / 2))) == {0}


def test_members_learn_the_popularity_with_the_next_view_and_it_alone_makes_none() -> None:
    c = running(3)
    before = c.view
    loads = np.zeros((LAYERS, EXPERTS), "<f4")
    loads[1, 2] = 1000
    router = c.members["r0"]
    c.send(router, replace(router.lease(), loads=loads.tobytes()))
    c.send(c.members["e0"], c.members["e0"].report())  # says nothing new, and has the coordinator look again
    c.run(1)
    assert c.view is before
    c.kill("e1")
    c.run(1)
    found = np.frombuffer(c.view.popularity, np.uint8).reshape(LAYERS, EXPERTS)
    assert found.argmax() == loads.argmax() and np.count_nonzero(found) == 1
