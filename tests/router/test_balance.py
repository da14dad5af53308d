"""Max/mean per layer of what was routed of late."""

from __future__ import annotations

import numpy as np
import pytest

from router.balance import KEPT_PER_REPORT, Balance


def test_max_over_mean_of_experts_and_of_servers():
    b = Balance()
    b.reshape(2, 4)
    b.chosen(0, np.array([6, 1, 1, 0]))
    b.sent("a", 0, 6)
    b.sent("b", 0, 2)
    experts, servers = b.report(["a", "b"])
    assert experts == [3.0, 0.0]  # no rows in layer 1
    assert servers == [1.5, 0.0]


def test_a_server_without_rows_counts_and_one_that_left_does_not():
    b = Balance()
    b.reshape(1, 2)
    b.sent("a", 0, 4)
    b.sent("gone", 0, 100)
    assert b.report(["a", "idle"])[1] == [2.0]


def test_what_was_long_ago_is_forgotten():
    b = Balance()
    b.reshape(1, 2)
    b.chosen(0, np.array([100, 0]))
    for _ in range(100):
        b.report([])
    b.chosen(0, np.array([0, 100]))
    assert b.report([])[0][0] == pytest.approx(2 / (1 + KEPT_PER_REPORT**100))


def test_nothing_is_counted_before_there_is_a_plan_and_all_is_new_with_another_model():
    b = Balance()
    b.chosen(0, np.array([1, 2]))
    assert b.report(["a"]) == ([], [])
    b.reshape(1, 2)
    b.chosen(0, np.array([1, 3]))
    b.sent("a", 0, 4)
    b.reshape(1, 3)
    assert b.report(["a"]) == ([0.0], [0.0])
