"""A late answer to an earlier use of a slot in shared memory hands over nobody's rows: played by a server by hand."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from moering import protocol
from moering.expert_frames import INLINE, Dispatch, Reply
from moering.protocol import Hello, NotHere, Welcome
from moering.shared_rows import SLOTS, Layout, SharedRows
from router.expert_rows import HostRows
from tests.router.test_exchange import EXPERTS, HIDDEN, LAYERS, Harness, Rows, Server

IDS = [[0, 1], [2, 3], [1, 2], [3, 0]]
ONLY = [[[0]] * EXPERTS] * LAYERS


class ByHand:
    """The server's end of one connection after another; each segment that it ever opened stays mapped."""

    def __init__(self, server: Server, harness: Harness) -> None:
        self.server, self.harness = server, harness
        self.identities: list[bytes] = []
        self.segments: list[SharedRows] = []

    def accept(self) -> None:
        """Answer the next hello."""
        self.harness.until(lambda: self.server.socket.poll(0))
        identity, header = self.server.socket.recv_multipart()
        hello, _ = protocol.decode([header])
        layout = Layout(hello.shared_slots, 1000, HIDDEN)
        segment = SharedRows.open(hello.shared_rows, layout)
        assert segment is not None
        self.identities.append(identity)
        self.segments.append(segment)
        rung = self.take_doorbell(hello)
        self.say(Welcome("a", self.server.incarnation, 1000, 1000, layout.rows, doorbell=rung))
        self.harness.connected(self.server)

    def take_doorbell(self, hello: Hello) -> bool:
        """Whether it listens to the one that the hello offers."""
        return False

    def say(self, message: object, connection: int = -1) -> None:
        self.server.socket.send_multipart([self.identities[connection], protocol.encode(message)])

    def receive(self) -> Dispatch:
        assert self.server.socket.poll(10_000), "nothing was sent"
        _, header, *_ = self.server.socket.recv_multipart()
        dispatch, _ = protocol.decode([header])
        assert isinstance(dispatch, Dispatch) and dispatch.slot != INLINE
        return dispatch

    def compute(self, dispatch: Dispatch, segment: int = -1) -> Reply:
        """Write what expert e makes of its rows (times e + 1) to the dispatch's slot: its reply, which is not sent."""
        mine, n = self.segments[segment], dispatch.rows
        factors = np.frombuffer(dispatch.pairs, np.uint16)[:, None] + 1.0
        mine.answered[dispatch.slot][:n] = mine.sent[dispatch.slot][:n] * factors
        return self.reply(dispatch)

    def reply(self, dispatch: Dispatch) -> Reply:
        incarnation = self.server.incarnation
        return Reply(dispatch.router, dispatch.seq, incarnation, 0, "float32", dispatch.rows, HIDDEN, dispatch.slot)


@pytest.fixture
def harness() -> Iterator[Harness]:
    h = Harness()
    yield h
    h.exchange.close()


@pytest.fixture
def by_hand(harness: Harness, tmp_path: Path) -> Iterator[ByHand]:
    server = Server(tmp_path, "a")
    harness.view(server, routing=ONLY)
    yield ByHand(server, harness)
    server.die()


def handled(harness: Harness, stale: int) -> None:
    """Until that many answers were found to be for nobody; nothing has been handed over by then."""
    counters = harness.exchange.dispatcher.counters
    harness.until(lambda: counters.stale_replies == stale)
    assert harness.exchange.take_finished() == []


def finish(harness: Harness, rows: Rows) -> None:
    assert harness.finish().micro_batch is rows
    assert (rows.output == rows.expected()).all()


@pytest.mark.parametrize("first", ["answered", "refused"])
def test_a_second_answer_to_what_a_slot_held_before(harness: Harness, by_hand: ByHand, first: str) -> None:
    by_hand.accept()
    harness.exchange.submit(Rows(IDS))
    before = by_hand.receive()
    if first == "answered":
        by_hand.say(by_hand.compute(before))
        harness.finish()
    else:  # its experts are not here: the rows are missing, and the slot is free
        by_hand.say(NotHere(before.router, before.seq, by_hand.server.incarnation, 1))
        harness.finish()
        harness.view(by_hand.server, routing=ONLY)
    rows = Rows(IDS, layer=1)
    rows.hidden *= 3
    harness.exchange.submit(rows)
    now = by_hand.receive()
    assert now.slot == before.slot, "the slot was not used again: this shows nothing"
    by_hand.segments[0].answered[now.slot][:] = 7.0  # another's rows
    by_hand.say(by_hand.reply(before))
    handled(harness, stale=1)
    by_hand.say(by_hand.compute(now))
    finish(harness, rows)


def test_a_server_that_was_given_up_writes_where_nobody_reads(harness: Harness, by_hand: ByHand) -> None:
    """It stood still with a dispatch in a slot, was given up and taken back; then it computes what it had."""
    by_hand.accept()
    given_up = Rows(IDS)
    harness.exchange.submit(given_up)
    before = by_hand.receive()
    connection = harness.exchange._connections["a"]
    harness.exchange._lose(connection, "the test says so", retry_s=0.0)
    assert len(harness.finish().missing) == given_up.ids.size
    by_hand.accept()
    rows = Rows(IDS, layer=1)
    rows.hidden *= 3
    harness.exchange.submit(rows)
    now = by_hand.receive()
    assert now.slot == before.slot, "the slot was not used again: this shows nothing"
    right = by_hand.compute(now)  # written, not sent
    by_hand.segments[0].sent[before.slot][:] = 7.0
    late = by_hand.compute(before, segment=0)
    by_hand.say(late)  # even over the new connection
    handled(harness, stale=1)
    by_hand.say(right)
    finish(harness, rows)


class Held(list[object]):
    """What holds the memory of an answer that a GPU has still to read: gone when it has."""


class SlowRows(Rows):
    """Rows whose outputs a GPU reads in the slots, later."""

    def __init__(self, readings: list[Held]) -> None:
        super().__init__(IDS)
        self.readings = readings

    @property
    def expert_rows(self) -> HostRows:
        return SlowHostRows(self)


class SlowHostRows(HostRows):
    def __init__(self, rows: SlowRows) -> None:
        super().__init__(rows.hidden, rows.output)
        self._readings = rows.readings

    def put(  # type: ignore[override]
        self, slots: np.ndarray, rows: np.ndarray, memory: object | None = None
    ) -> weakref.ref[Held]:
        super().put(slots, rows)
        self._readings.append(Held([memory]))
        return weakref.ref(self._readings[-1])


def test_a_slot_stays_taken_until_its_answer_has_been_read(harness: Harness, by_hand: ByHand) -> None:
    by_hand.accept()
    readings: list[Held] = []

    def go_through() -> int:
        harness.exchange.submit(SlowRows(readings))
        dispatch = by_hand.receive()
        by_hand.say(by_hand.compute(dispatch))
        harness.finish()
        return dispatch.slot

    def next_slot() -> int:
        harness.exchange.submit(Rows(IDS))
        _, header, *frames = by_hand.server.socket.recv_multipart()
        return int(protocol.decode([header, *frames])[0].slot)

    used = [go_through() for _ in range(SLOTS)]
    assert len(set(used)) == SLOTS, "the GPU has yet to read all that were answered"
    assert next_slot() == INLINE
    second = readings.pop(1)
    del second
    assert next_slot() == INLINE, "slots are looked at in the order in which they were answered"
    del readings[0]
    assert {go_through(), go_through()} == set(used[:2])


def test_memory_of_a_lost_connection_goes_when_the_gpu_has_done_with_it(tmp_path: Path) -> None:
    log: list[str] = []

    def pin(memory: np.ndarray) -> Callable[[], None]:
        log.append("pinned")
        return lambda: log.append("unpinned")

    harness = Harness(pin=pin)
    server = Server(tmp_path, "a")
    harness.view(server, routing=ONLY)
    by_hand = ByHand(server, harness)
    by_hand.accept()
    readings: list[Held] = []
    harness.exchange.submit(SlowRows(readings))
    by_hand.say(by_hand.compute(by_hand.receive()))
    harness.finish()
    harness.exchange.close()
    server.die()
    assert log == ["pinned"]
    readings.clear()
    assert log == ["pinned", "unpinned"]


def test_a_slot_stays_taken_until_its_answer_is_here(harness: Harness, by_hand: ByHand) -> None:
    by_hand.accept()
    works = [Rows(IDS, layer=n % LAYERS) for n in range(SLOTS)]
    dispatches = []
    for rows in works:
        rows.hidden *= 1 + works.index(rows)
        harness.exchange.submit(rows)
        dispatches.append(by_hand.receive())
    assert len({d.slot for d in dispatches}) == SLOTS
    harness.exchange.submit(Rows(IDS))
    _, header, *frames = by_hand.server.socket.recv_multipart()
    assert protocol.decode([header, *frames])[0].slot == INLINE, "all are taken: in frames"
    by_hand.say(by_hand.compute(dispatches[2]))
    finish(harness, works[2])
    harness.exchange.submit(Rows(IDS))
    assert by_hand.receive().slot == dispatches[2].slot
