"""Routers of the same machine, heard and answered by way of their doorbells; played by hand."""

import select
from pathlib import Path

import numpy as np
import pytest

from moering import protocol
from moering.doorbell import DoorbellOffer
from moering.expert_frames import Dispatch, Reply
from moering.protocol import Failed, Hello, NotHere, Refused, Welcome
from moering.shared_rows import SLOTS, Layout, Offer
from tests.expert_server.test_batching import HIDDEN
from tests.expert_server.test_service import Router, rows, service

__all__ = ["service"]


class NearRouter(Router):
    """Shares memory and a doorbell with the server."""

    def __init__(self, address, name="r", doorbell=True):
        super().__init__(address)
        offer, pipes = Offer.make(), DoorbellOffer.make()
        hello = Hello(name, 9, "model", "digest", offer.text, SLOTS, doorbell=pipes.text if doorbell else "")
        self.welcome, _ = self.ask(protocol.encode(hello))
        assert isinstance(self.welcome, Welcome)
        self.memory = offer.accepted(Layout(SLOTS, self.welcome.slot_rows, HIDDEN))
        offer.withdraw()
        self.bell = pipes.accepted() if self.welcome.doorbell else pipes.withdraw()

    def dispatch(self, seq, slot=0, expert=3, layer=0):
        self.memory.sent[slot][:1] = rows(2)[1:]
        experts = np.array([expert], "<u2").tobytes()
        return protocol.encode(Dispatch(9, seq, layer, False, experts, "float32", 1, HIDDEN, slot))

    def next(self):
        readable, _, _ = select.select([self.bell.fd], [], [], 20.0)
        assert readable, "no answer"
        packet = self.bell.receive()
        return packet and protocol.decode([packet])[0]

    def answered(self, slot=0, factor=4):
        return (self.memory.answered[slot][0] == rows(2)[1] * factor).all()

    def leave(self):
        if self.bell and not self.bell.hung_up:
            self.bell.close()
        self.socket.close()


@pytest.fixture
def near(service):
    router = NearRouter(service[1])
    assert router.welcome.doorbell
    yield router
    router.leave()


def mapped():
    return Path("/proc/self/maps").read_text().count("moering-rows")


def test_a_ring_is_answered_by_a_ring(near):
    for seq in range(3):
        assert near.bell.send(near.dispatch(seq, slot=seq))
        reply = near.next()
        assert isinstance(reply, Reply) and (reply.seq, reply.slot) == (seq, seq)
        assert near.answered(slot=seq)
    assert not near.socket.poll(0), "nothing came through zmq"


def test_all_that_has_been_rung_is_answered(near):
    for seq in range(2 * SLOTS):
        assert near.bell.send(near.dispatch(seq, slot=seq % SLOTS))
    assert [near.next().seq for _ in range(2 * SLOTS)] == list(range(2 * SLOTS))


def test_a_dispatch_through_zmq_is_answered_by_a_ring(near):
    near.socket.send(near.dispatch(1))
    assert near.next().seq == 1 and near.answered()


def test_an_error_comes_through_zmq(near):
    for expert, layer, kind in ((7, 0, NotHere), (3, 99, Failed)):
        assert near.bell.send(near.dispatch(1, expert=expert, layer=layer))
        answer, _ = protocol.decode(near.socket.recv_multipart())
        assert isinstance(answer, kind)


def test_garbage_through_a_doorbell_costs_its_sender_an_error_and_others_nothing(near, service):
    other = NearRouter(service[1], "other")
    for garbage in (b"\xff", bytes(100)):
        assert near.bell.send(garbage)
        answer, _ = protocol.decode(near.socket.recv_multipart())
        assert isinstance(answer, Refused)
    assert other.bell.send(other.dispatch(1)) and other.next().seq == 1
    other.leave()


def test_a_full_doorbell_is_answered_through_zmq(near):
    sent = 0
    while not near.socket.poll(1):  # nobody takes the answers, so that they fill the other pipe
        assert sent < 1000, "no answer came through zmq"
        sent += near.bell.send(near.dispatch(sent))
    answer, _ = protocol.decode(near.socket.recv_multipart())
    assert isinstance(answer, Reply)
    assert near.next().seq == 0, "those before it wait in the pipe"


def test_a_router_that_hangs_up_gives_back_its_memory_at_once(near, service):
    """It has rung before, and that is computed, for nobody."""
    other = NearRouter(service[1], "other")
    before = mapped()
    assert near.bell.send(near.dispatch(1))
    near.bell.close()
    near.bell.hung_up = True
    for seq in range(3):  # a turn after the one that sees it
        assert other.bell.send(other.dispatch(seq)) and other.next().seq == seq
    assert near.answered() and mapped() < before
    other.leave()


def test_without_a_doorbell_zmq_rings(service):
    router = NearRouter(service[1], doorbell=False)
    assert router.welcome.slot_rows and not router.welcome.doorbell
    router.socket.send(router.dispatch(5))
    answer, _ = protocol.decode(router.socket.recv_multipart())
    assert answer.seq == 5 and router.answered()
    router.leave()


def test_a_doorbell_without_shared_memory_is_not_used(service):
    router, pipes = Router(service[1]), DoorbellOffer.make()
    welcome, _ = router.ask(protocol.encode(Hello("r", 9, "model", "digest", doorbell=pipes.text)))
    assert not welcome.doorbell and not welcome.slot_rows
    pipes.withdraw()
    router.socket.close()


def test_a_second_hello_of_a_connection_replaces_its_doorbell(near):
    offer, pipes = Offer.make(), DoorbellOffer.make()
    hello = Hello("r", 9, "model", "digest", offer.text, SLOTS, doorbell=pipes.text)
    welcome, _ = near.ask(protocol.encode(hello))
    assert welcome.doorbell
    assert near.next() is None and near.bell.hung_up
    near.bell.close()
    near.memory, near.bell = offer.accepted(Layout(SLOTS, welcome.slot_rows, HIDDEN)), pipes.accepted()
    offer.withdraw()
    assert near.bell.send(near.dispatch(2)) and near.next().seq == 2 and near.answered()


def test_a_service_that_closes_hangs_up(near, service):
    service[0].close()
    assert near.next() is None and near.bell.hung_up
