"""The coordinator's decisions, one rule at a time, on a clock of ours. No socket, no sleep."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moering import protocol
from moering.actions import Send
from moering.errors import ProtocolError
from moering.membership import Membership
from moering.protocol import Abort, Held, Lease, ProvenExit, Refused, Registered, Unknown, View
from tests.moering.cluster import EXPERTS, LAYERS, Cluster, Member, digests, of, pack, running, servers, table

ALL = {(layer, e) for layer in range(LAYERS) for e in range(EXPERTS)}


def holders(view: View, which: str = "routing") -> list[set[str]]:
    return [set(row) for rows in table(view, which) for row in rows]


# --- the start -------------------------------------------------------------------------------------------------------


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


# --- deaths ----------------------------------------------------------------------------------------------------------


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


# --- suspicion -------------------------------------------------------------------------------------------------------


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


def test_a_declared_pause_is_respected() -> None:
    c = running(4, routers=2)
    c.members["e0"].busy_for_s = 2.0
    for r in ("r0", "r1"):
        c.members[r].suspects = ["e0"]
    c.run(20)
    assert all(m.state != "OFFLINE" for v in c.published for m in v.members)
    c.members["e0"].busy_for_s = 0.0
    c.run(5)
    assert any(m.state == "OFFLINE" for v in c.published for m in v.members)


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


# --- moves -----------------------------------------------------------------------------------------------------------


def test_a_move_has_two_steps_and_the_old_replica_stays_until_the_routers_know() -> None:
    c = running(3, routers=2)
    c.members["r1"].acknowledging = False
    before = {i: of(c.view, "routing", i) for i in c.view.servers}
    joiner = c.add(Member("expert-server", "e3", state="JOINING", loading=False))
    c.run(0.2)
    share = of(c.view, "target", "e3")
    assert share
    assert {i: of(c.view, "routing", i) for i in before} == before  # step 1 changes no routing
    for i, pairs in before.items():
        assert of(c.view, "target", i) >= pairs
    joiner.follow()
    c.send(joiner, joiner.report())
    c.send(joiner, joiner.lease())
    c.run(1)
    moved = [(i, pair) for i, pairs in before.items() for pair in pairs - of(c.view, "routing", i)]
    assert moved  # step 2: others no longer take these tokens
    assert of(c.view, "routing", "e3") == share
    c.run(5)
    for i, pair in moved:  # but r1 may still send them
        assert pair in of(c.view, "target", i)
        assert pair in c.members[i].held
    assert c.members["r1"].view is not None
    c.members["r1"].acknowledged = (c.members["r1"].view.term, c.members["r1"].view.epoch)
    c.run(1.5)
    for i, pair in moved:
        assert pair not in of(c.view, "target", i)
        assert pair not in c.members[i].held


def test_a_router_that_died_holds_up_no_move() -> None:
    c = running(3, routers=2)
    c.members["r1"].acknowledging = False
    c.add(Member("expert-server", "e3", state="JOINING"))
    c.run(2)
    assert sum(len(m.held) for m in c.members.values()) > 2 * len(ALL)
    c.kill("r1")
    c.run(1)
    assert sum(len(m.held) for m in c.members.values()) == 2 * len(ALL)


def test_a_draining_server_is_emptied_while_it_serves() -> None:
    c = running(3)
    c.members["e0"].state = "DRAINING"
    for i in ("e1", "e2"):
        c.members[i].loading = False
    c.run(2)
    assert of(c.view, "routing", "e0") == c.members["e0"].held  # it goes on until others can
    for i in ("e1", "e2"):
        m = c.members[i]
        m.loading = True
        for reply in m.follow():
            c.send(m, reply)
    c.run(3)
    assert c.members["e0"].held == set()
    assert all(h == {"e1", "e2"} for h in holders(c.view))


def test_draining_never_takes_the_last_replica() -> None:
    c = running(2)
    c.kill("e1")
    c.members["e0"].state = "DRAINING"
    c.run(20)
    assert of(c.view, "routing", "e0") == ALL
    assert of(c.view, "target", "e0") == ALL


def test_tokens_counted_by_routers_shape_the_next_plan() -> None:
    c = running(3)
    loads = np.zeros((LAYERS, EXPERTS), "<f4")
    loads[0, :2] = 1e6  # two experts with all the tokens of layer 0
    router = c.members["r0"]
    c.send(router, replace(router.lease(), loads=loads.tobytes()))
    c.add(Member("gateway", "g1"))  # no change of plan
    c.run(1)
    first = [row[0] for row in table(c.view, "routing")[0]]
    c.add(Member("expert-server", "e3", state="JOINING"))
    c.run(3)
    first = [row[0] for row in table(c.view, "routing")[0]]
    assert first[0] != first[1]


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(c: Cluster, member: Member) -> str:
    c.add(member)
    c.run(1)
    assert member.server_id not in c.states() or c.states()[member.server_id] != member.state
    return member.refused


def test_another_checkpoint_is_refused_with_both_named() -> None:
    c = running(3)
    for kind in ("expert-server", "router"):
        reason = refused(c, Member(kind, "x", digest="other"))
        assert "digest d)" in reason and "digest other)" in reason


def test_another_shape_is_refused() -> None:
    c = running(3)
    register = replace(Member("router", "x").register(), layers=LAYERS + 1)
    answer = c.coordinator.handle(b"x", register, c.now_s)[0]
    assert isinstance(answer, Send) and isinstance(answer.message, Refused) and answer.message.fatal
    assert f"{LAYERS} layers" in answer.message.reason and f"{LAYERS + 1} layers" in answer.message.reason


def test_other_numerics_are_refused_unless_allowed() -> None:
    c = running(3)
    reason = refused(c, Member("expert-server", "x", fingerprint="other", state="JOINING"))
    assert "fingerprint f" in reason and "other" in reason
    c = running(3, allow_inexact=True)
    c.add(Member("expert-server", "x", fingerprint="other", state="JOINING"))
    c.run(2)
    assert c.states()["x"] == "ONLINE"


def test_when_all_are_gone_another_model_may_come() -> None:
    c = running(2)
    for i in ("e0", "e1", "r0"):
        c.kill(i)
    c.run(1)
    for n in range(2):
        c.add(Member("expert-server", f"n{n}", digest="new", fingerprint="new", state="JOINING"))
    c.run(3)
    assert sorted(c.view.servers) == ["n0", "n1"]
    assert c.view.failures_survivable == 1


def test_a_replica_with_other_bytes_is_refused() -> None:
    c = running(3)
    e0 = c.members["e0"]
    wrong = bytearray(digests(e0.held))
    wrong[0] ^= 1
    c.send(e0, Held("e0", 1, pack(e0.held), bytes(wrong)))
    c.run(0.1)
    layer, expert = min(e0.held)
    assert f"layer {layer} expert {expert}" in e0.refused
    assert c.states()["e0"] == "OFFLINE"
    assert of(c.view, "routing", "e0") == set()


def test_an_id_belongs_to_one_kind() -> None:
    c = running(3)
    answer = c.coordinator.handle(b"x", Member("router", "g0", incarnation=9).register(), c.now_s)[0]
    assert isinstance(answer, Send) and isinstance(answer.message, Refused)
    assert c.states()["g0"] == "ONLINE"


def bad_messages() -> list[object]:
    server, router = Member("expert-server", "e0"), Member("router", "r0")
    register, lease = Member("expert-server", "x").register(), server.lease()
    view = View(1, 1, [], ["a"], 1, 1, 1, b"\1\0", b"\0\0", 1, 0, 0, 0)
    return [
        Abort("x", 1),
        replace(register, layers=60000, experts=60000),
        replace(register, layers=0),
        replace(register, held=b"abc"),
        replace(register, held=pack({(LAYERS, 0)})),
        replace(register, member=replace(register.member, kind="coordinator")),
        replace(register, member=replace(register.member, state="OFFLINE")),
        replace(register, member=replace(register.member, server_id="")),
        replace(register, member=replace(register.member, capacity=-1)),
        replace(register, view=b"garbage"),
        replace(register, view=protocol.encode(lease)),
        replace(register, view=protocol.encode(view)),
        replace(register, view=protocol.encode(replace(view, routing=b"\0\0\0\0"))),
        replace(lease, state="OFFLINE"),
        replace(router.lease(), loads=b"\0" * 4),
        replace(router.lease(), loads=np.full(LAYERS * EXPERTS, np.nan, "<f4").tobytes()),
        Held("r0", 1, b"", b""),
        Held("e0", 1, pack({(0, 1)}), b""),
        Held("e0", 1, pack({(0, 1)})[:3], b""),
        Held("e0", 1, pack({(0, 1)}) * 2, digests({(0, 1)}) * 2),
    ]


@pytest.mark.parametrize("number", range(len(bad_messages())))
def test_messages_that_no_honest_member_sends_change_nothing(number: int) -> None:
    c = running(3)
    before = c.view
    with pytest.raises(ProtocolError):
        c.coordinator.handle(b"x", bad_messages()[number], c.now_s)
    c.run(2)
    assert c.view == before


# --- a new coordinator -----------------------------------------------------------------------------------------------


def restart(c: Cluster) -> View:
    old = c.view
    c.run(1)
    c.start_coordinator()
    return old


def test_a_new_coordinator_goes_on_where_the_old_one_was() -> None:
    c = running(3)
    old = restart(c)
    held = {i: set(m.held) for i, m in c.members.items()}
    c.run(4)
    assert (c.view.term, c.view.epoch) > (old.term, old.epoch)
    assert c.view.term == old.term + 1
    assert table(c.view, "routing") == table(old, "routing")
    assert table(c.view, "target") == table(old, "target")
    assert {i: m.held for i, m in c.members.items()} == held


def test_a_new_coordinator_publishes_nothing_until_all_are_back() -> None:
    c = running(3)
    restart(c)
    late = c.members["e1"]
    late.silent = True
    published = len(c.published)
    c.run(6)
    assert len(c.published) <= published + 1  # at most the empty one before the first member
    assert c.coordinator.view is None or c.coordinator.view.layers == 0
    late.silent = False
    c.run(3)
    assert c.view.failures_survivable == 1
    assert of(c.view, "routing", "e1") == late.held


def test_a_new_coordinator_waits_no_longer_than_a_lease() -> None:
    c = running(3)
    restart(c)
    c.kill("e1", proven=False)
    c.run(9)
    assert c.coordinator.view is None or c.coordinator.view.layers == 0
    c.run(4)
    assert c.states()["e1"] == "OFFLINE"
    assert all(h == {"e0", "e2"} for h in holders(c.view))


def test_a_proven_exit_shortens_the_wait_and_keeps_the_share() -> None:
    c = running(3)
    restart(c)
    share = of(c.published[-1], "target", "e1")
    c.kill("e1")
    c.run(3)
    assert c.states()["e1"] == "OFFLINE"
    assert of(c.view, "target", "e1") == share
    back = c.add(Member("expert-server", "e1", incarnation=2, state="JOINING"))
    c.run(2)
    assert back.held == share


def test_a_newcomer_without_a_view_is_there_first() -> None:
    c = running(3)
    old = restart(c)
    for m in c.members.values():
        m.silent = True
    c.kill("e1")
    c.add(Member("expert-server", "e1", incarnation=2, state="JOINING"))
    c.run(3)
    for m in c.members.values():
        m.silent = False
    c.run(4)
    assert c.view.term > old.term and c.view.epoch > old.epoch
    assert c.view.failures_survivable == 1
    assert of(c.view, "target", "e1") == of(old, "target", "e1")


def test_a_view_from_a_later_term_lifts_ours_above_it() -> None:
    c = running(3)
    view = replace(c.view, term=41, epoch=500)
    stranger = Member("gateway", "g9", view=view)
    c.add(stranger)
    c.run(1)
    assert (c.view.term, c.view.epoch) > (41, 500)
    assert stranger.view == c.view


def test_an_unknown_member_is_asked_to_register() -> None:
    c = Membership(running(1).rules, running(1).coordinator.own, 0.0)
    answer = c.handle(b"x", Lease("e0", 1, "ONLINE", 0, 0, 0.0, [], 0, 0, b""), 1.0)
    assert answer == [Send(b"x", Unknown(1))]
    assert [type(a.message) for a in c.handle(b"x", Member("gateway", "g").register(), 1.0) if isinstance(a, Send)] == [
        Registered
    ]
