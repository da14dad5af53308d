"""The coordinator's log: at INFO what an operator has to know, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from moering.view_log import PROGRESS_S, ViewLog
from tests.moering.cluster import Cluster, Member, running, servers

FULL = "every expert has 2 replicas"


@pytest.fixture(autouse=True)
def info(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level("INFO"):
        yield


def test_a_start_is_the_first_plan_all_experts_served_and_redundancy(caplog: pytest.LogCaptureFixture) -> None:
    c = Cluster(*servers(3), Member("router", "r0"), Member("gateway", "g0"), expert_servers=3)
    c.run(5.0)
    assert len(c.published) > len(caplog.messages), "or there is nothing to be quiet about"
    assert [text.partition(": ")[2] for text in caplog.messages] == [
        "6 processes; 8 of 8 experts without a replica; 8 of 8 under 2 replicas",
        f"6 processes; failures survivable 1, restorable 1; {FULL}",
    ]


def test_a_death_says_what_is_left_and_the_return_that_all_is_well(caplog: pytest.LogCaptureFixture) -> None:
    c = running(3)
    caplog.clear()
    c.kill("e1")
    c.run(1.0)
    c.add(Member("expert-server", "e1", incarnation=2, state="JOINING"))
    c.run(3.0)
    lost, *_, restored = [r.getMessage() for r in caplog.records if r.name == "moering.view_log"]
    assert "failures survivable 0" in lost and "under 2 replicas" in lost
    assert FULL in restored and "failures survivable 1" in restored


def test_loads_that_go_on_are_a_line_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    view, log = running(3).view, ViewLog()
    caplog.clear()
    for second in range(26):
        log.published(replace(view, under_target=8 - second // 4), 100.0 + second)
    seconds = [0, PROGRESS_S, 2 * PROGRESS_S]
    assert [text.split("; ")[-1] for text in caplog.messages] == [
        f"{8 - int(s) // 4} of 8 under 2 replicas" for s in seconds
    ]


def test_a_member_that_comes_is_no_news_of_redundancy(caplog: pytest.LogCaptureFixture) -> None:
    c = running(3)
    caplog.clear()
    c.add(Member("gateway", "g1"))
    c.run(2.0)
    assert c.states()["g1"] == "ONLINE" and not caplog.messages
