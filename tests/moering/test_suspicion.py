"""Deaths without proof: votes, probes, the brake. One rule at a time, on a clock of ours. No socket, no sleep."""

from __future__ import annotations

import pytest

from tests.moering.cluster import (
    holders,
    of,
    running,
)


def test_a_majority_of_routers_for_three_seconds() -> None:
    c = running(4, routers=3)
    c.members["r0"].suspects = ["e0"]
    c.run(10)
    assert c.states()["e0"] == "ONLINE"  # one of three
    c.members["r1"].suspects = ["e0"]
    c.run(2.9)
    assert c.states()["e0"] == "ONLINE"
    c.run(2)
    assert "OFFLINE" in [m.state for v in c.published for m in v.members if m.server_id == "e0"]
    assert not c.probes


def test_suspicion_that_ends_in_time_starts_anew() -> None:
    c = running(4, routers=2)
    for _ in range(4):
        for suspects in (["e0"], []):
            for r in ("r0", "r1"):
                c.members[r].suspects = suspects
            c.run(2)
    assert all(m.state != "OFFLINE" for v in c.published for m in v.members)


@pytest.mark.parametrize(("answer", "dies"), [("answered", False), ("silent", True), ("refused", True)])
def test_a_single_router_needs_the_coordinators_own_probe_to_agree(answer: str, dies: bool) -> None:
    c = running(3, routers=1)
    c.members["r0"].suspects = ["e0"]
    c.run(4.2)
    assert [(p.server_id, p.incarnation) for p in c.probes] == [("e0", 1)]
    assert c.states()["e0"] == "ONLINE"
    c.act(c.coordinator.probe_result("e0", 1, answer, c.now_s))
    c.members["e0"].silent = dies
    c.run(0.2)
    assert c.states()["e0"] == ("OFFLINE" if dies else "ONLINE")
    c.run(3.5)
    assert len(c.probes) == (1 if dies else 2)  # asked again as long as the router goes on


def test_with_a_single_router_a_loop_that_stands_still_agrees_too() -> None:
    c = running(3, routers=1)
    c.members["e0"].queued = 5
    c.members["e1"].queued, c.members["e1"].progress = 5, 1
    c.members["r0"].suspects = ["e0", "e1"]
    for _ in range(45):
        c.members["e1"].progress += 1
        c.run(0.1)
    offline = {m.server_id for v in c.published for m in v.members if m.state == "OFFLINE"}
    assert offline == {"e0"}


@pytest.mark.parametrize("routers", [1, 3])
def test_a_server_that_answers_nothing_is_dead_only_when_its_own_loop_stands_still(routers: int) -> None:
    c = running(4, routers=routers)
    for n in range(routers):
        c.members[f"r{n}"].wedged = ["e0", "e1"]
    c.members["e0"].queued = c.members["e1"].queued = 5
    c.members["e0"].progress = 1
    for _ in range(100):
        c.members["e0"].progress += 1  # slow, but alive
        c.run(0.1)
    offline = {m.server_id for v in c.published for m in v.members if m.state == "OFFLINE"}
    assert offline == {"e1"}


def test_one_router_of_three_that_gets_no_answers_buries_nobody() -> None:
    c = running(4, routers=3)
    c.members["r0"].wedged = ["e0"]
    c.members["e0"].queued = 5
    c.run(10)
    assert c.states()["e0"] == "ONLINE"


def test_the_brake() -> None:
    c = running(6)
    for i in ("e0", "e1", "e2"):
        c.members[i].silent = True
    before = of(c.view, "routing", "e0")
    only = [row for row in holders(c.view) if row <= {"e0", "e1", "e2"}]
    c.run(15)
    assert c.states()["e0"] == "ONLINE"
    assert of(c.view, "routing", "e0") == before  # nothing is taken from them
    assert only and all(row - {"e0", "e1", "e2"} for row in holders(c.view))  # but what only they had is loaded
    c.kill("e0")  # a proof is not braked, and leaves two
    c.run(0.2)
    assert [c.states()[i] for i in ("e0", "e1", "e2")] == ["OFFLINE"] * 3


def test_after_a_pause_of_its_own_the_coordinator_blames_nobody() -> None:
    c = running(3)
    c.now_s += 30
    c.act(c.coordinator.tick(c.now_s))
    assert "OFFLINE" not in c.states().values()
    c.run(5)
    assert "OFFLINE" not in c.states().values()
