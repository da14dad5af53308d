"""A new coordinator learns all from its members. One rule at a time, on a clock of ours. No socket, no sleep."""

from __future__ import annotations

from dataclasses import replace

from moering.actions import Send
from moering.membership import Membership
from moering.protocol import Lease, Registered, Unknown, View
from tests.moering.cluster import (
    Cluster,
    Member,
    holders,
    of,
    running,
    table,
)


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
    answer = c.handle(b"x", Lease("e0", 1, "ONLINE", 0, 0, [], 0, 0, b""), 1.0)
    assert answer == [Send(b"x", Unknown(1))]
    assert [type(a.message) for a in c.handle(b"x", Member("gateway", "g").register(), 1.0) if isinstance(a, Send)] == [
        Registered
    ]


def test_a_server_that_was_given_up_is_not_sent_the_view_without_it() -> None:
    c = running(3)
    back = c.members["e1"]
    back.silent = True
    c.run(12)
    assert "e1" not in c.view.servers
    held = set(back.held)
    c.send(back, back.register())
    c.send(back, back.lease())  # before the next tick
    back.silent = False
    assert back.view is not None and "e1" in back.view.servers  # the last one that it has taken
    assert back.held == held
    c.run(1)
    assert "e1" in c.view.servers


def test_over_a_new_connection_a_member_registers_again_with_what_it_holds() -> None:
    c = running(3)
    m = c.members["e1"]
    c.send(m, replace(m.report(), held=b"", digests=b""))  # as if its last report was lost with the connection
    c.run(1)
    assert c.view.failures_survivable == 0
    m.connection = 2
    c.run(3)
    assert c.view.failures_survivable == 1
    assert of(c.view, "routing", "e1") == m.held
