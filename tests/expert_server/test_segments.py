"""Which connection reaches which memory: only its own, and only as long as its router has no other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from expert_server.segments import MAX_ROUTERS, Segments
from moering.expert_frames import Dispatch
from moering.shared_rows import MAX_SLOTS, SLOT_BYTES, SLOTS, Layout, Offer, SharedRows
from tests.moering.test_shared_rows import Pins

LAYOUT = Layout.of(SLOTS, SLOT_BYTES, 8)


def dispatch(slot: int, dtype: str = "float32") -> Dispatch:
    return Dispatch(1, 1, 0, False, b"", dtype, 3, 8, slot)


@pytest.fixture
def offers() -> Iterator[list[Offer]]:
    made = [m for m in (Offer.make() for _ in range(2)) if m is not None]
    assert len(made) == 2
    yield made
    for offer in made:
        offer.withdraw()


def mapped(offer: Offer) -> SharedRows:
    segment = offer.accepted(LAYOUT)
    assert segment is not None
    return segment


def test_a_late_dispatch_of_a_connection_that_was_given_up_reaches_no_memory(offers: list[Offer]) -> None:
    old, new = map(mapped, offers)
    segments = Segments(8, SLOT_BYTES)
    assert segments.open(b"first", "router", offers[0].text, SLOTS, "float32") == LAYOUT.rows
    parsed = segments.slot(b"first", dispatch(1))
    assert parsed is not None
    assert segments.open(b"second", "router", offers[1].text, SLOTS, "float32")
    assert segments.slot(b"first", dispatch(1)) is None
    parsed[1][:] = 7.0  # what was in hand when the router came again is answered into the old memory
    assert (old.answered[1][:3] == 7.0).all() and (new.answered[1] == 0.0).all()


def test_a_late_hello_of_a_connection_that_was_given_up_takes_no_memory_from_the_next(offers: list[Offer]) -> None:
    """zmq reads connections in turn, and the last one takes the turn of one that has nothing more to say."""
    segments = Segments(8, SLOT_BYTES)
    assert segments.open(b"second", "router", offers[1].text, SLOTS, "float32")
    offers[0].withdraw()
    assert segments.open(b"first", "router", offers[0].text, SLOTS, "float32") == 0
    assert segments.slot(b"second", dispatch(1)) is not None


def test_a_connection_reaches_its_own_slots_only(offers: list[Offer]) -> None:
    routers = [mapped(offer) for offer in offers]
    segments = Segments(8, SLOT_BYTES)
    assert segments.open(b"a", "one", offers[0].text, SLOTS, "float32") and segments.open(
        b"b", "other", offers[1].text, SLOTS, "float32"
    )
    for identity, own in ((b"a", 0), (b"b", 1)):
        pair = segments.slot(identity, dispatch(0))
        assert pair is not None
        pair[1][:] = 1.0 + own
    assert [float(s.answered[0][0, 0]) for s in routers] == [1.0, 2.0]
    assert segments.slot(b"a", dispatch(SLOTS)) is None and segments.slot(b"nobody", dispatch(0)) is None
    assert segments.slot(b"a", dispatch(0, "bfloat16")) is None


@pytest.mark.parametrize("slots", [0, MAX_SLOTS + 1])
def test_a_number_of_slots_that_cannot_be_is_not_used(offers: list[Offer], slots: int) -> None:
    assert Segments(8, SLOT_BYTES).open(b"a", "one", offers[0].text, slots, "float32") == 0


def test_memory_of_a_connection_that_was_given_up_is_not_pinned_any_more(offers: list[Offer]) -> None:
    pins = Pins()
    segments = Segments(8, SLOT_BYTES, pins)

    def use(identity: bytes, router: str, offer: Offer, slot: int) -> None:
        assert segments.open(identity, router, offer.text, SLOTS, "float32")
        assert segments.slot(identity, dispatch(slot)) is not None
        assert segments.slot(identity, dispatch(slot)) is not None

    use(b"first", "router", offers[0], 1)
    use(b"second", "router", offers[1], 1)
    assert (len(pins.now), pins.undone) == (1, 1)
    for n in range(MAX_ROUTERS):
        use(f"i{n}".encode(), f"r{n}", offers[0], 0)
    assert (len(pins.now), pins.undone) == (MAX_ROUTERS, 2), "the one that said hello longest ago lost its memory"


def test_with_too_many_routers_the_first_has_to_say_hello_again(offers: list[Offer]) -> None:
    segments = Segments(8, SLOT_BYTES)
    for n in range(MAX_ROUTERS + 1):
        assert segments.open(f"i{n}".encode(), f"r{n}", offers[0].text, SLOTS, "float32")
    assert segments.slot(b"i0", dispatch(0)) is None and segments.slot(b"i1", dispatch(0)) is not None
