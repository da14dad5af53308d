"""Which silence belongs to which window."""

from __future__ import annotations

import pytest

from bench.client import Arrival, Exchange
from bench.gaps import Window, between, first_token_wait, intervals, outside, tokens_per_s, within


def stream(*times: float, started_s: float = 0.0) -> Exchange:
    return Exchange(started_s=started_s, arrivals=[Arrival(t, "x", [1], []) for t in times])


def test_a_gap_over_the_kill_counts_whole() -> None:
    spans = intervals(stream(1.0, 1.1, 2.1, 2.2))
    assert within(spans, Window(1.5, 1.6)) == [pytest.approx(1.0)]
    assert outside(spans, [Window(1.5, 1.6)]) == pytest.approx([0.1, 0.1])


def test_every_gap_is_in_a_window_or_outside_all() -> None:
    spans = intervals(stream(*(0.1 * i for i in range(50))))
    windows = [Window(1.0, 2.0), Window(3.0, 3.5)]
    inside = [gap for window in windows for gap in within(spans, window)]
    assert len(inside) + len(outside(spans, windows)) == 49
    assert len(inside) >= 15


def test_neighbours_of_a_window_are_outside() -> None:
    spans = [(0.0, 1.0), (2.0, 3.0)]
    assert within(spans, Window(1.0, 2.0)) == []
    assert outside(spans, [Window(1.0, 2.0)]) == [1.0, 1.0]


def test_the_wait_for_the_first_token_is_not_a_gap() -> None:
    late = stream(5.0, 5.1, started_s=1.0)
    assert intervals(late) == [(5.0, 5.1)]
    assert first_token_wait(late) == [(1.0, 5.0)]
    assert first_token_wait(stream()) == [] == intervals(stream())


def test_rates_count_what_arrived_in_the_windows() -> None:
    exchanges = [stream(0.5, 1.0, 1.5, 2.0), stream(1.9, 9.0)]
    assert tokens_per_s(exchanges, [Window(1.0, 2.0)]) == pytest.approx(3.0)
    assert tokens_per_s(exchanges, [Window(1.0, 2.0), Window(8.0, 10.0)]) == pytest.approx(4 / 3)
    assert tokens_per_s(exchanges, []) is None


def test_what_is_left_between_windows() -> None:
    assert between([Window(1, 2), Window(3, 4)], Window(0, 5)) == [Window(0, 1), Window(2, 3), Window(4, 5)]
    assert between([], Window(0, 5)) == [Window(0, 5)]
    assert between([Window(0, 4.5)], Window(0, 4.2)) == []  # a recovery that outlasts the run
