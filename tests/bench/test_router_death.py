"""The bench's arithmetic: which gap belongs to a kill, and what it is held against."""

from __future__ import annotations

import dataclasses

import pytest

from bench.account import Account
from bench.client import Arrival, Exchange
from bench.router_death import Death, Gap, Phase, RouterDeathConfig, _figures, gap_across, split
from moering.errors import ConfigError


def record(*times: float) -> Exchange:
    return Exchange(arrivals=[Arrival(t, "x", [1], []) for t in times])


@pytest.mark.parametrize(("at_s", "gap"), [(1.5, 3.0), (1.0, 3.0), (3.9, 3.0), (4.0, 1.0), (0.5, None), (6.0, None)])
def test_the_gap_across_a_moment(at_s: float, gap: float | None) -> None:
    assert gap_across(record(1.0, 4.0, 5.0), at_s) == gap


def test_the_longest_gaps_are_those_of_the_streams_that_moved() -> None:
    gaps = [Gap(0.1, 10), Gap(2.0, 20), Gap(0.3, 30), Gap(1.0, 40)]
    moved, others = split(gaps, 2)
    assert [g.tokens for g in moved] == [20, 40] and {g.tokens for g in others} == {10, 30}
    assert split(gaps, 0) == ([], sorted(gaps, key=lambda g: -g.seconds))


CLEAN = Account(requests=4, tokens=400)


def figures(over_s: float, account: Account = CLEAN) -> dict:
    """Two deaths; the second one's longest gap exceeds its prefill by `over_s` once a router is there again."""
    first = Death([Gap(2.0, 100), Gap(1.5, 100)], [Gap(0.1, 50)], 4.0)
    second = Death([Gap(5.0 + over_s, 100)], [], 4.5)
    phase = Phase(20.0, [first, second], account)
    return _figures(phase, [[1.8, 1.0], [0.5]], [0.0, 4.5], allowance_s=1.0)


def test_a_gap_is_held_against_its_prefill_and_the_time_without_a_router() -> None:
    good = figures(over_s=0.9)
    assert (good["kills"], good["moved_streams"], good["within_bar"], good["met"]) == (2, 3, 3, True)
    assert good["over_prefill_s"] == {"p50": 0.5, "p90": 0.9, "max": 0.9}
    assert good["gap_others_s"]["max"] == 0.1 and good["restart_s"]["max"] == 4.5
    bad = figures(over_s=1.1)
    assert (bad["within_bar"], bad["met"]) == (2, False)


@pytest.mark.parametrize("fault", ["lost", "duplicated", "changed", "changed_digests", "errors"])
def test_a_token_that_differs_misses_the_bar(fault: str) -> None:
    assert not figures(0.0, dataclasses.replace(CLEAN, **{fault: 1}))["met"]


def test_impossible_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="requests at least streams"):
        RouterDeathConfig(requests=3)
