"""Which connection reaches which memory: only its own, and only as long as its router has no other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from expert_server.segments import MAX_ROUTERS, Segments
from moering.shared_rows import SLOTS, SharedRows


@pytest.fixture
def offered() -> Iterator[list[SharedRows]]:
    made = [m for m in (SharedRows.create(8) for _ in range(2)) if m is not None]
    assert len(made) == 2
    yield made
    for segment in made:
        segment.withdraw()


def test_a_late_dispatch_of_a_connection_that_was_given_up_reaches_no_memory(offered: list[SharedRows]) -> None:
    old, new = offered
    segments = Segments(8)
    assert segments.open(b"first", "router", old.offer)
    parsed = segments.slot(b"first", 1, 3, 8)
    assert parsed is not None
    assert segments.open(b"second", "router", new.offer)
    assert segments.slot(b"first", 1, 3, 8) is None
    parsed[1][:] = 7.0  # what was in hand when the router came again is answered into the old memory
    assert (old.answered[1][:3] == 7.0).all() and (new.answered[1] == 0.0).all()


def test_a_connection_reaches_its_own_slots_only(offered: list[SharedRows]) -> None:
    segments = Segments(8)
    assert segments.open(b"a", "one", offered[0].offer) and segments.open(b"b", "other", offered[1].offer)
    for identity, own in ((b"a", 0), (b"b", 1)):
        pair = segments.slot(identity, 0, 2, 8)
        assert pair is not None
        pair[1][:] = 1.0 + own
    assert [float(s.answered[0][0, 0]) for s in offered] == [1.0, 2.0]
    assert segments.slot(b"a", SLOTS, 2, 8) is None and segments.slot(b"nobody", 0, 2, 8) is None


def test_with_too_many_routers_the_first_has_to_say_hello_again(offered: list[SharedRows]) -> None:
    segments = Segments(8)
    for n in range(MAX_ROUTERS + 1):
        assert segments.open(f"i{n}".encode(), f"r{n}", offered[0].offer)
    assert segments.slot(b"i0", 0, 1, 8) is None and segments.slot(b"i1", 0, 1, 8) is not None
