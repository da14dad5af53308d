"""The figures of the bench of membership; the bench itself is run by hand."""

from __future__ import annotations

from typing import Any

import pytest

from bench.account import Output
from bench.client import Arrival, Exchange
from bench.gaps import Window
from bench.membership_etcd import report, table
from bench.streams import Recorded


def recorded(*at_s: float, error: str | None = None) -> Recorded:
    exchange = Exchange()
    exchange.arrivals = [Arrival(s, str(i), [i], []) for i, s in enumerate(at_s)]
    exchange.error = error
    return Recorded(0, 0, exchange)


def figures(*streams: Recorded, elected: tuple[str, str, str] = ("a", "b", "b")) -> dict[str, Any]:
    windows = {"no failure": Window(0.0, 10.0), "etcd gone": Window(10.0, 20.0)}
    return report(windows, list(streams), {0: Output(range(3))}) | {"elected": elected}


def test_a_gap_counts_in_the_phase_that_it_touches() -> None:
    phases = figures(recorded(1.0, 1.2, 1.3), recorded(9.9, 10.5, 10.6))["phases"]
    assert [p["longest_gap_ms"] for p in phases.values()] == [pytest.approx(600.0), pytest.approx(600.0)]
    phases = figures(recorded(1.0, 1.2, 1.3), recorded(10.1, 10.2, 10.5))["phases"]
    assert [p["longest_gap_ms"] for p in phases.values()] == [pytest.approx(200.0), pytest.approx(300.0)]


def test_the_verdicts() -> None:
    calm, good = recorded(1.0, 1.2, 1.3), recorded(11.0, 11.3, 11.4)
    assert "MISSED" not in table(figures(calm, good))
    for bad in (
        figures(calm, recorded(11.0, 11.4, 11.5)),  # 200 ms more than without a failure
        figures(calm, recorded(11.0, 11.1)),  # a token is lost
        figures(calm, recorded(11.0, 11.1, 11.2, error="x")),
        figures(calm, good, elected=("a", "a", "a")),
        figures(calm, good, elected=("a", "b", "a")),
    ):
        assert table(bad).count("MISSED") == 1
