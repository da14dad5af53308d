"""A router's end of a doorbell: what goes that way, and what its hang-up means; the server is played by hand."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from moering import protocol
from moering.doorbell import Doorbell
from moering.expert_frames import Dispatch
from moering.protocol import Hello, NotHere
from tests.router.test_exchange import Harness, Rows, Server
from tests.router.test_reused_slots import IDS, ONLY, ByHand, harness

__all__ = ["harness"]


class Near(ByHand):
    """It takes the doorbell, and answers there."""

    def take_doorbell(self, hello: Hello) -> bool:
        bell = Doorbell.open(hello.doorbell)
        assert bell is not None
        self.bell = bell
        return True

    def heard(self) -> Dispatch:
        """The next dispatch that came through the doorbell."""
        packet = self.bell.receive()
        assert packet is not None, "nothing was rung"
        dispatch, _ = protocol.decode([packet])
        assert isinstance(dispatch, Dispatch)
        return dispatch

    def ring(self, message: object) -> None:
        assert self.bell.send(protocol.encode(message))


@pytest.fixture
def near(harness: Harness, tmp_path: Path) -> Iterator[Near]:
    server = Server(tmp_path, "a")
    harness.view(server, routing=ONLY)
    made = Near(server, harness)
    made.accept()
    yield made
    server.die()


def test_dispatch_and_answer_pass_zmq_by(harness: Harness, near: Near) -> None:
    rows = Rows(IDS)
    harness.exchange.submit(rows)
    near.ring(near.compute(near.heard()))
    assert harness.finish().micro_batch is rows
    assert (rows.output == rows.expected()).all()
    assert not near.server.socket.poll(0)


@pytest.mark.parametrize("way", ["rung", "zmq"])
def test_answers_and_refusals_are_taken_whichever_way_they_come(harness: Harness, near: Near, way: str) -> None:
    tell = near.ring if way == "rung" else near.say
    rows = Rows(IDS)
    harness.exchange.submit(rows)
    tell(near.compute(near.heard()))
    harness.finish()
    assert (rows.output == rows.expected()).all()
    harness.exchange.submit(Rows(IDS))
    dispatch = near.heard()
    tell(NotHere(dispatch.router, dispatch.seq, near.server.incarnation, 1))
    assert len(harness.finish().missing) == rows.ids.size


def test_what_the_pipe_has_no_room_for_goes_through_zmq(harness: Harness, near: Near) -> None:
    connection = harness.exchange._connections["a"]
    assert connection.bell is not None
    while connection.bell.send(b"x"):
        pass
    rows = Rows(IDS)
    harness.exchange.submit(rows)
    near.say(near.compute(near.receive()))
    harness.finish()
    assert (rows.output == rows.expected()).all()


def test_an_answer_before_a_hang_up_counts_and_what_is_left_is_lost(harness: Harness, near: Near) -> None:
    """Replies come before losses; zmq's own word of the loss, which never comes here, is not waited for."""
    first, second = Rows(IDS), Rows(IDS, layer=1)
    harness.exchange.submit(first)
    answered = near.heard()
    harness.exchange.submit(second)
    near.ring(near.compute(answered))
    near.bell.close()
    done = []

    def both() -> bool:
        done.extend(harness.exchange.take_finished())
        return len(done) == 2

    harness.until(both)
    assert (first.output == first.expected()).all()
    assert [(f.micro_batch, len(f.missing)) for f in done] == [(first, 0), (second, second.ids.size)]
    assert harness.exchange.suspects == ["a"]
    assert harness.exchange.dispatcher.counters.servers_lost == 1


def test_a_bad_packet_costs_the_connection(harness: Harness, near: Near) -> None:
    harness.exchange.submit(Rows(IDS))
    assert near.bell.send(b"\xc1garbage")
    assert len(harness.finish().missing) == len(IDS) * 2
    assert harness.exchange.suspects == ["a"]
    assert near.heard() and near.bell.receive() is None and near.bell.hung_up
