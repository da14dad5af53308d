"""Several coordinators on a real etcd: one is elected, another takes over, and only the elected one is heard."""

from __future__ import annotations

import signal

import zmq

from moering import protocol, transport
from moering.protocol import Refused, View
from tests.etcd_nodes import wait_for
from tests.membership_etcd.members import Candidate, Cluster
from tests.moering.cluster import Member, table
from tests.moering.stubs import DEADLINE_S


def two(members: Cluster) -> tuple[Candidate, Candidate]:
    """The elected coordinator and the one that waits."""
    a, b = members.add_candidate("a"), members.add_candidate("b")
    elected = members.elected("a", "b")
    return (a, b) if elected is a else (b, a)


def test_another_takes_over_when_the_elected_one_is_killed(members: Cluster) -> None:
    first, second = two(members)
    assert first.said("elected for term 1") and not second.said("elected for")
    before = members.members["r0"].view
    first.process.kill()
    members.elected(second.name)
    after = members.members["r0"].view
    assert (before.term, after.term) == (1, 2) and after.epoch > before.epoch
    assert table(after, "routing") == table(before, "routing")
    assert all(m.terms == sorted(m.terms) for m in members.members.values())


def test_one_that_is_told_to_stop_gives_the_office_up_at_once(members: Cluster) -> None:
    first, second = two(members)
    first.process.terminate()
    assert first.process.wait(DEADLINE_S) == 0
    wait_for("the other is elected", lambda: second.said("elected for term 2"))
    members.elected(second.name)


def test_a_stopped_one_that_wakes_up_beside_its_successor_is_not_heard(members: Cluster) -> None:
    first, second = two(members)
    first.process.send_signal(signal.SIGSTOP)
    members.elected(second.name)
    stranger = transport.make_socket(zmq.DEALER, reconnect=True)
    try:
        transport.connect(stranger, first.address)
        newcomer = Member("gateway", "g9")
        stranger.send(protocol.encode(newcomer.register()))
        first.process.send_signal(signal.SIGCONT)
        wait_for("it has noticed", lambda: first.said("no longer the elected coordinator"))
        stranger.send(protocol.encode(newcomer.lease()))
        answers = []
        while not answers or not isinstance(answers[-1], Refused):
            assert stranger.poll(DEADLINE_S * 1000)
            answers.append(protocol.decode(stranger.recv_multipart())[0])
        assert not any(isinstance(a, View) for a in answers)
        assert "not the elected one" in answers[-1].reason and not answers[-1].fatal
    finally:
        stranger.close()
    members.elected(second.name)
    assert all(m.terms[-1] == 2 and m.terms == sorted(m.terms) for m in members.members.values())


def test_all_go_on_with_the_last_view_while_etcd_is_away(members: Cluster) -> None:
    first, _ = two(members)
    before = members.members["r0"].view
    members.etcd.kill()
    members.lose("e2")
    wait_for("it is found dead", lambda: first.said("e2 (pid 100) is OFFLINE"))
    wait_for("it cannot publish that", lambda: first.said("nothing is published until it does"))
    assert members.all_see(lambda v: (v.term, v.epoch) == (before.term, before.epoch))
    members.etcd.start()
    wait_for("it can", lambda: members.all_see(lambda v: {m.server_id: m.state for m in v.members}["e2"] == "OFFLINE"))
    members.elected("a", "b")
    assert all(set(row) == {"e0", "e1"} for layer in table(members.members["r0"].view, "routing") for row in layer)
