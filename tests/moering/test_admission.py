"""Who is refused, and with which words. One rule at a time, on a clock of ours. No socket, no sleep."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moering import protocol
from moering.actions import Send
from moering.errors import ProtocolError
from moering.protocol import Abort, Held, Refused, View
from tests.moering.cluster import (
    EXPERTS,
    LAYERS,
    Cluster,
    Member,
    digests,
    of,
    pack,
    running,
)


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


@pytest.mark.parametrize("kind", ["expert-server", "router"])
def test_other_numerics_are_refused_unless_allowed(kind: str) -> None:
    c = running(3)
    reason = refused(c, Member(kind, "x", fingerprint="other", state="JOINING"))
    assert "fingerprint f" in reason and "other" in reason
    c = running(3, allow_inexact=True)
    c.add(Member(kind, "x", fingerprint="other", state="JOINING"))
    c.run(2)
    assert "x" in c.states()


def test_numerics_are_compared_within_a_kind_and_with_those_who_are_here() -> None:
    c = running(3)
    c.kill("r0")
    c.run(1)
    c.add(Member("router", "r1", fingerprint="a router's"))
    c.run(1)
    assert c.states()["r1"] == "ONLINE"
    assert "r1 has the fingerprint a router's" in refused(c, Member("router", "x", fingerprint="f"))


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
