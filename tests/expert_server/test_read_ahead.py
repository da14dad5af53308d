"""Reading ahead: the next experts are read while the first is waited for, and nothing else is."""

import threading
from typing import Any

import pytest

from expert_server.read_ahead import ReadAhead

DEADLINE_S = 30.0


class Store:
    """Reads block until released; `begun` tells when a number of them have started."""

    def __init__(self):
        self.release, self.changed, self.reads = threading.Event(), threading.Condition(), []

    def read(self, layer, expert):
        with self.changed:
            self.reads.append((layer, expert))
            self.changed.notify_all()
        assert self.release.wait(DEADLINE_S)
        if expert == 99:
            raise OSError("unreadable")
        return f"{layer}.{expert}"

    def reader(self, threads) -> Any:
        return ReadAhead(self.read, threads)

    def begun(self, count):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.reads) >= count, DEADLINE_S)


def test_as_many_as_there_are_threads_are_read_at_once():
    store = Store()
    reader = store.reader(3)
    reader.announce([(0, e) for e in range(5)])
    store.begun(3)
    store.release.set()
    assert [reader(0, e) for e in range(3)] == ["0.0", "0.1", "0.2"]
    assert sorted(store.reads) == [(0, 0), (0, 1), (0, 2)]
    reader.announce([(0, 3), (0, 4)])
    assert [reader(0, 3), reader(0, 4)] == ["0.3", "0.4"]
    assert len(store.reads) == 5  # each once


def test_with_one_thread_nothing_is_read_ahead():
    store = Store()
    store.release.set()
    reader = store.reader(1)
    reader.announce([(0, 0), (0, 1)])
    assert store.reads == []
    assert reader(0, 1) == "0.1"


def test_an_error_reaches_who_asks_for_that_expert():
    store = Store()
    store.release.set()
    reader = store.reader(2)
    reader.announce([(0, 99), (0, 1)])
    with pytest.raises(OSError, match="unreadable"):
        reader(0, 99)
    assert reader(0, 1) == "0.1"


def test_a_changed_plan_drops_what_was_announced():
    store = Store()
    reader = store.reader(2)
    reader.announce([(0, 0), (0, 1)])
    store.begun(2)
    reader.announce([(1, 0)])
    store.release.set()
    assert reader(1, 0) == "1.0"
    assert reader(0, 0) == "0.0" and store.reads.count((0, 0)) == 2  # read again, as it is no longer kept
