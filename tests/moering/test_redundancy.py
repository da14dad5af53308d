"""Several failures at once: what is promised beforehand is what the plan and the coordinator then do."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moering.ring import Member as Server
from moering.ring import failures_restorable, failures_survivable, orphans, plan, under_target
from tests.moering.cluster import ALL, Cluster, Member, holders, of, running

PAIRS = len(ALL)


def members(*capacities: int, zones: str = "") -> list[Server]:
    return [Server(f"s{i}", c, zones[i] if zones else "") for i, c in enumerate(capacities)]


# --- what memory allows ----------------------------------------------------------------------------------------------


def test_restorable_is_what_the_worst_losses_leave_room_for() -> None:
    assert failures_restorable(members(16, 16, 16), 2, 16) == 1  # two must be left, whatever fits in them
    assert failures_restorable(members(12, 12, 12), 2, 16) == 0  # 24 places for 32 replicas after a loss
    assert failures_restorable(members(8, 8, 8), 2, 16) == -1
    assert failures_restorable(members(40, 8, 8), 2, 16) == 0  # a second copy on one server is none
    assert failures_restorable(members(16, 12, 12, 12), 2, 16) == 1
    assert failures_restorable(members(), 1, 1) == -1


def test_a_zone_counts_as_one_failure_and_as_one_place() -> None:
    assert failures_restorable(members(16, 16, 16, 16, zones="aabb"), 2, 16) == 0
    assert failures_restorable(members(16, 16, 16, 16, zones="abcc"), 2, 16) == 1
    assert failures_restorable(members(16, 16, zones="aa"), 2, 16) == -1


def test_those_who_leave_do_not_count() -> None:
    leaving = Server("s9", 16, state="DRAINING")
    assert failures_restorable([*members(16, 16), leaving], 2, 16) == 0


cases = st.fixed_dictionaries(
    {
        "capacities": st.lists(st.integers(1, 14), min_size=1, max_size=6),
        "zones": st.sampled_from(["", "abcabc", "aabbcc"]),
        "replication": st.integers(1, 3),
        "experts": st.integers(1, 6),
    }
)


@settings(max_examples=150, deadline=None)
@given(cases)
def test_what_is_called_restorable_is_restored_after_every_such_loss(case: dict) -> None:
    replication, experts = case["replication"], case["experts"]
    all_ = members(*case["capacities"], zones=case["zones"])
    domains = sorted({m.zone or m.server_id for m in all_})
    restorable = failures_restorable(all_, replication, 2 * experts)
    before = plan(None, all_, None, replication, 2, experts)
    for lost in itertools.combinations(domains, max(restorable, 0)):
        left = [m for m in all_ if (m.zone or m.server_id) not in lost]
        after = plan(before, left, None, replication, 2, experts)
        if restorable >= 0:
            assert under_target(after.replicas, replication) == 0
    further = itertools.combinations(domains, restorable + 1)  # of these at least one cannot be
    survivors = [[m for m in all_ if (m.zone or m.server_id) not in lost] for lost in further]
    assert any(not _spread(left, replication, experts) for left in survivors)


def _spread(left: list[Server], replication: int, experts: int) -> bool:
    """Whether the plan for these puts every expert into `replication` failure domains."""
    fresh = plan(None, left, None, replication, 2, experts)
    return failures_survivable(fresh.replicas, fresh.servers, {m.server_id: m.zone for m in left}) >= replication - 1


def test_with_memory_short_first_copies_come_first_and_what_is_missing_is_named() -> None:
    short = plan(None, members(5, 5, 5), None, 2, 2, 4)
    assert (orphans(short.replicas), under_target(short.replicas, 2)) == (0, 1)
    shorter = plan(short, members(3, 3), None, 2, 2, 4)
    assert (orphans(shorter.replicas), under_target(shorter.replicas, 2)) == (2, 8)


# --- k of n at once --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", range(1, 9))
@pytest.mark.parametrize("seed", range(3))
def test_k_of_eight_at_once(k: int, seed: int) -> None:
    c = running(8)
    assert (c.view.failures_survivable, c.view.failures_restorable) == (1, 6)
    before = [set(row) for row in holders(c.view)]
    lost = random.Random(seed).sample([f"e{i}" for i in range(8)], k)
    for server_id in lost:
        c.kill(server_id)
    c.run(0.3)
    gone = sum(row <= set(lost) for row in before)
    if k < 8:
        assert c.view.orphans == 0, "orphans are loaded at once, by whoever is left"
        assert all(row and not row & set(lost) for row in holders(c.view))
    else:
        assert (c.view.orphans, c.view.failures_survivable) == (PAIRS, -1) == (gone, -1)
    c.run(6)  # the grace time is over
    assert c.view.failures_restorable == 6 - k if k < 7 else c.view.failures_restorable == -1
    assert c.view.failures_survivable == (1 if k < 7 else 0 if k == 7 else -1)
    for server_id in lost:
        c.add(Member("expert-server", server_id, incarnation=2, state="JOINING"))
    c.run(8)
    assert (c.view.failures_survivable, c.view.failures_restorable, c.view.under_target) == (1, 6, 0)
    assert {m.state for m in c.view.members} == {"ONLINE"}


def test_a_second_loss_while_the_first_one_is_being_loaded() -> None:
    c = running(4)
    for member in c.members.values():
        member.loading = False  # they have been told, and have not finished
    first, second = holders(c.view)[0]
    c.kill(first)
    c.kill(second)
    c.run(0.2)
    assert c.view.orphans > 0
    loader = next(i for i in ("e0", "e1", "e2", "e3") if (0, 0) in of(c.view, "target", i) and i in c.members)
    c.kill(loader)
    c.run(0.2)
    (last,) = [m for m in c.members.values() if m.kind == "expert-server"]
    assert of(c.view, "target", last.server_id) == ALL, "what the dead one was loading goes to who is left"
    last.loading = True
    for reply in last.follow():
        c.send(last, reply)
    c.run(0.2)
    assert c.view.orphans == 0


# --- a zone ----------------------------------------------------------------------------------------------------------


class Zoned(Cluster):
    """Eight servers in the zones a and b in turn."""

    def __init__(self, *all_: Member, **rules: float) -> None:
        for i, member in enumerate(m for m in all_ if m.kind == "expert-server"):
            member.zone = "ab"[i % 2]
        super().__init__(*all_, **rules)


def test_no_expert_loses_its_last_replica_with_a_zone() -> None:
    c = running(8, kind=Zoned)
    zone = {f"e{i}": "ab"[i % 2] for i in range(8)}
    assert all({zone[s] for s in row} == {"a", "b"} for row in holders(c.view))
    assert (c.view.failures_survivable, c.view.failures_restorable) == (1, 0)
    published = len(c.published)
    for server_id in ("e0", "e2", "e4", "e6"):
        c.kill(server_id)
    c.run(8)
    assert all(v.orphans == 0 for v in c.published[published:])
    # Two copies of each again, as well as one zone can: another zone's death would not be survived.
    assert (c.view.under_target, c.view.failures_survivable, c.view.failures_restorable) == (0, 0, -1)
    for i in (0, 2, 4, 6):
        c.add(Member("expert-server", f"e{i}", incarnation=2, state="JOINING", zone="a"))
    c.run(8)
    assert (c.view.failures_survivable, c.view.failures_restorable) == (1, 0)


# --- the brake -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "mute", "holds"),
    [(6, 3, True), (8, 3, True), (10, 3, False), (10, 4, True), (4, 2, False), (8, 8, True)],
)
def test_the_brake_holds_from_three_and_more_than_30_percent(count: int, mute: int, holds: bool) -> None:
    c = running(count)
    lost = [f"e{i}" for i in range(mute)]
    for server_id in lost:
        c.members[server_id].silent = True
    before = {i: of(c.view, "target", i) for i in c.members}
    c.run(30)
    states = {c.states()[i] for i in lost}
    assert states == ({"ONLINE"} if holds else {"OFFLINE"})
    if holds:  # nothing is dropped and nobody forgotten, however long it lasts
        assert all(before[i] <= of(c.view, "target", i) for i in c.members)
        assert c.view.orphans == 0
        assert [row for row in holders(c.view) if row <= set(lost)] == [] or mute == count
    for server_id in lost:
        c.members[server_id].silent = False
    c.run(4)
    assert set(c.states().values()) == {"ONLINE"}
    assert c.view.under_target == 0 and c.view.failures_survivable >= 1


def test_a_coordinator_that_is_cut_off_forgets_nobody_of_any_kind() -> None:
    c = running(2)
    for member in c.members.values():
        member.silent = True
    c.run(30)
    assert set(c.states().values()) == {"ONLINE"}, "two servers, a router and a gateway: each kind is few, all are many"
    for member in c.members.values():
        member.silent = False
    c.run(3)
    assert set(c.states().values()) == {"ONLINE"}


def test_leases_that_lapse_one_after_the_other_are_braked_too() -> None:
    c = running(3, routers=0)
    c.stagger_s = 0.2
    c.run(3)
    for server_id in ("e0", "e1", "e2"):
        c.members[server_id].silent, c.members[server_id].loading = True, False
    c.run(30)
    assert set(c.states().values()) == {"ONLINE"}
    assert c.view.orphans == 0


def test_servers_suspected_one_after_the_other_are_braked_too() -> None:
    c = running(4, routers=3)
    for n in range(3):
        for router in ("r0", "r1"):
            c.members[router].suspects.append(f"e{n}")
        c.run(1)
    c.run(10)
    assert not any(m.state == "OFFLINE" for view in c.published for m in view.members)


def test_the_brake_of_one_kind_does_not_hold_another() -> None:
    c = running(12)
    for server_id in ("e0", "e1", "e2", "e3"):
        c.members[server_id].silent = True
    c.members["g0"].silent = True
    c.run(13)
    assert [c.states()[i] for i in ("e0", "g0")] == ["ONLINE", "ONLINE"]  # 5 of 14 are too many of all
    c.members["e3"].silent = False
    c.run(2)
    assert [c.states()[i] for i in ("e0", "g0")] == ["OFFLINE", "OFFLINE"]  # 3 of 12, 4 of 14


def test_a_proof_is_not_braked_and_those_in_doubt_are_asked_for_one() -> None:
    c = running(6)
    for server_id in ("e0", "e1", "e2"):
        c.members[server_id].silent = True
    c.run(12)
    asked = [p.server_id for p in c.probes]
    assert sorted(set(asked)) == ["e0", "e1", "e2"]
    c.run(10)
    assert 3 <= len(c.probes) - len(asked) <= 12, "again and again, but not at every tick"
    c.act(c.coordinator.probe_result("e1", 1, "answered", c.now_s))
    c.act(c.coordinator.probe_result("e0", 1, "refused", c.now_s))
    assert c.coordinator.roster.records["e0"].info.state == "OFFLINE"
    c.run(0.2)
    assert c.view.orphans == 0
    assert [c.states()[i] for i in ("e1", "e2")] == ["OFFLINE", "OFFLINE"], "two are few enough to be believed"


def test_a_proven_death_during_the_brake_leaves_no_orphan() -> None:
    c = running(8)
    for server_id in ("e0", "e1", "e2"):
        c.members[server_id].silent = True
    c.run(13)
    for server_id in ("e3", "e4"):
        c.kill(server_id)
    c.run(0.3)
    assert c.view.orphans == 0
    sure = {"e5", "e6", "e7"}
    assert all(row & sure for row in holders(c.view)), "what only they and those in doubt had is loaded by the others"
