"""The coordinator's decisions: the start, and deaths. One rule at a time, on a clock of ours. No socket, no sleep."""

from __future__ import annotations

from moering.actions import Send
from moering.protocol import ProvenExit, Refused, Unknown
from tests.moering.cluster import (
    ALL,
    EXPERTS,
    LAYERS,
    Cluster,
    Member,
    holders,
    of,
    running,
    servers,
    table,
)


def test_the_first_plan_waits_for_the_expected_servers() -> None:
    c = Cluster(*servers(2), expert_servers=3, settle_s=15)
    c.run(5)
    assert c.view.layers == 0  # the members already see each other
    assert c.states() == {"e0": "JOINING", "e1": "JOINING"}
    c.add(Member("expert-server", "e2", state="JOINING"))
    c.run(2)
    assert c.view.failures_survivable == 1
    assert all(len(h) == 2 for h in holders(c.view))
    assert set(c.states().values()) == {"ONLINE"}


def test_the_first_plan_waits_no_longer_than_settle_s() -> None:
    c = Cluster(*servers(2), expert_servers=3, settle_s=4)
    c.run(4.5)
    assert c.view.layers == 0
    c.run(1)
    assert c.view.failures_survivable == 1


def test_without_a_number_the_first_plan_waits_for_a_pause_in_registrations() -> None:
    c = Cluster(*servers(2), expert_servers=0)
    c.run(2.5)
    c.add(Member("expert-server", "e2", state="JOINING"))
    c.run(1.5)
    assert c.view.layers == 0
    c.run(2)
    assert sorted(c.view.servers) == ["e0", "e1", "e2"]


def test_a_joining_server_is_not_routed_to_before_it_is_online() -> None:
    e0 = Member("expert-server", "e0", state="JOINING", loading=False)
    c = Cluster(e0, expert_servers=1)
    c.run(2)
    e0.held = set(ALL)
    c.send(e0, e0.report())
    c.run(0.2)
    assert of(c.view, "routing", "e0") == set()
    e0.state = "ONLINE"
    c.send(e0, e0.lease())
    c.run(0.2)
    assert of(c.view, "routing", "e0") == ALL
    assert (c.view.orphans, c.view.under_target, c.view.failures_survivable) == (0, LAYERS * EXPERTS, 0)


def test_one_view_for_all_events_between_two_ticks() -> None:
    c = running(3)
    published = len(c.published)
    for i in range(3):
        c.add(Member("gateway", f"new{i}"))
    c.run(0.5)
    assert len(c.published) == published + 1
    assert {m.view.epoch for m in c.members.values() if m.view} == {c.view.epoch}


def test_nothing_is_published_while_nothing_changes() -> None:
    c = running(3)
    published = len(c.published)
    c.run(30)
    assert len(c.published) == published


def test_a_member_that_missed_a_view_gets_it_again() -> None:
    c = running(3)
    gateway = c.members["g0"]
    lost, gateway.view, gateway.acknowledged = gateway.view, None, (0, 0)
    c.run(3.5)
    assert gateway.view == lost


def test_a_proven_exit_counts_at_once_and_the_share_waits_for_the_restart() -> None:
    c = running(3)
    share = of(c.view, "target", "e0")
    c.kill("e0")
    c.run(0.1)
    assert c.states()["e0"] == "OFFLINE"
    assert of(c.view, "routing", "e0") == set()
    assert of(c.view, "target", "e0") == share
    others = {i: of(c.view, "target", i) for i in ("e1", "e2")}
    c.run(4)
    back = c.add(Member("expert-server", "e0", incarnation=2, state="JOINING"))
    c.run(1.5)
    assert back.held == share
    assert {i: of(c.view, "target", i) for i in ("e1", "e2")} == others  # nothing moved
    assert c.view.failures_survivable == 1


def test_after_the_grace_time_the_share_goes_to_the_others() -> None:
    c = running(3)
    c.kill("e0")
    c.run(4.8)
    assert c.view.under_target > 0
    c.run(1)
    assert c.view.failures_survivable == 1
    assert all(h == {"e1", "e2"} for h in holders(c.view))


def test_orphans_are_loaded_at_once() -> None:
    c = running(3)
    both = [row == {"e0", "e1"} for row in holders(c.view)]
    assert any(both)
    c.kill("e0")
    c.kill("e1")
    c.run(0.3)
    assert c.view.orphans == 0
    assert all(row == {"e2"} for row in holders(c.view))
    kept = of(c.view, "target", "e0") | of(c.view, "target", "e1")
    for i in ("e0", "e1"):
        c.add(Member("expert-server", i, incarnation=2, state="JOINING"))
    c.run(4)
    assert c.view.failures_survivable == 1
    assert of(c.view, "target", "e0") | of(c.view, "target", "e1") == kept
    assert len(of(c.view, "target", "e2")) < len(ALL)  # what it took in an emergency is dropped again


def test_an_orphan_is_loaded_even_where_the_dead_share_must_give_way() -> None:
    c = running(4, capacity=4)  # 16 places for 16 replicas
    a, b = table(c.view, "routing")[0][0]
    c.kill(a)
    c.kill(b)
    c.run(0.5)
    assert c.view.orphans == 0
    c.run(2)  # the router has acknowledged
    for i in c.members:
        assert len(of(c.view, "target", i)) <= 4


def test_a_proven_exit_of_an_older_incarnation_changes_nothing() -> None:
    c = running(3)
    old = c.members["e0"]
    c.add(Member("expert-server", "e0", incarnation=2, state="JOINING"))
    c.run(1.5)
    epoch = c.view.epoch
    c.act(c.coordinator.handle(b"launcher", ProvenExit("e0", old.pid, -9), c.now_s))
    c.act(c.coordinator.handle(b"launcher", ProvenExit("nobody", 1, -9), c.now_s))
    c.run(1)
    assert c.view.epoch == epoch
    assert c.states()["e0"] == "ONLINE"


def test_a_new_incarnation_replaces_the_old_one_at_once() -> None:
    c = running(3)
    old = c.members["e0"]
    share = of(c.view, "routing", "e0")
    c.add(Member("expert-server", "e0", incarnation=2, state="JOINING", loading=False))
    c.run(0.1)
    assert of(c.view, "routing", "e0") == set()
    assert of(c.view, "target", "e0") == share
    answers = c.coordinator.handle(old.identity, old.lease(), c.now_s)
    assert [type(a.message) for a in answers if isinstance(a, Send)] == [Unknown]
    answers = c.coordinator.handle(old.identity, old.register(), c.now_s)
    assert isinstance(answers[0], Send) and isinstance(answers[0].message, Refused)
    assert "incarnation" in answers[0].message.reason


def test_a_lapsed_lease_is_a_death_without_proof() -> None:
    c = running(3)
    c.members["e0"].silent = True
    c.run(9.5)
    assert c.states()["e0"] == "ONLINE"
    c.run(3)
    assert c.states()["e0"] == "OFFLINE"
    assert all(h == {"e1", "e2"} for h in holders(c.view))
    c.members["e0"].silent = False  # it was cut off and comes back, the same process
    c.run(4)
    assert c.states()["e0"] == "ONLINE"
    assert c.view.failures_survivable == 1


def test_one_who_leaves_is_offline_at_once() -> None:
    c = running(3)
    c.leave("g0")
    c.leave("e1")
    c.run(0.1)
    assert (c.states()["g0"], c.states()["e1"]) == ("OFFLINE", "OFFLINE")
    assert of(c.view, "routing", "e1") == set()


def test_the_dead_stay_visible_for_a_minute() -> None:
    c = running(3)
    c.kill("g0")
    c.run(59)
    assert c.states()["g0"] == "OFFLINE"
    c.run(2)
    assert "g0" not in c.states()
