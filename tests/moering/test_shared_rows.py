"""Memory that two processes share: both see the rows, nothing is left of it, and nothing else can be opened as one."""

import errno
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from moering import shared_rows
from moering.shared_rows import MAX_BYTES, MAX_SLOTS, SLOT_BYTES, SLOTS, Layout, Offer, SharedRows

SMALL = Layout.of(SLOTS, SLOT_BYTES, 8)


@pytest.fixture
def offer():  # type: ignore[no-untyped-def]
    made = Offer.make()
    assert made is not None
    yield made
    made.withdraw()


def accepted(offer: Offer, layout: Layout) -> SharedRows:
    segment = offer.accepted(layout)
    assert segment is not None
    return segment


def test_another_process_sees_the_rows_and_answers(offer: Offer) -> None:
    mine = accepted(offer, SMALL)
    mine.sent[1][:3] = np.arange(24).reshape(3, 8)
    code = f"""
from moering.shared_rows import Layout, SharedRows
s = SharedRows.open({offer.text!r}, Layout{tuple(SMALL)})
s.answered[1][:3] = s.sent[1][:3] * 2
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (mine.answered[1][:3] == 2 * np.arange(24).reshape(3, 8)).all()


@pytest.mark.parametrize("layout", [SMALL, Layout(3, 5, 24), Layout(1, 1, 1)])
def test_slots_do_not_overlap(offer: Offer, layout: Layout) -> None:
    mine = accepted(offer, layout)
    parts = [part for slot in range(layout.slots) for part in (mine.sent[slot], mine.answered[slot])]
    for i, rows in enumerate(parts):
        assert rows.shape == (layout.rows, layout.columns)
        rows[:] = i
    assert [float(rows.min()) for rows in parts] == list(range(2 * layout.slots))
    assert SharedRows.open(offer.text, layout) is not None, "the nonce is whole"


@pytest.mark.parametrize("hidden", [2048, 7168])
def test_slots_hold_whole_answers_and_take_no_memory_before_they_are_used(offer: Offer, hidden: int) -> None:
    layout = Layout.of(2 * SLOTS, 1024 * hidden * 4, hidden)
    assert layout.rows == 1024 and layout.possible
    mine = accepted(offer, layout)

    def taken() -> int:
        return os.fstat(offer._fd).st_blocks * 512

    before = taken()
    assert mine.ready(0) and mine.ready(0)
    assert before <= shared_rows._PAGE
    # huge pages, where a machine gives them to files in memory, begin and end beside the slot
    assert 2 * layout.part_bytes <= taken() - before <= 2 * layout.part_bytes + (4 << 20)


def test_a_layout_keeps_within_the_file() -> None:
    assert Layout.of(SLOTS, SLOT_BYTES, 2048).rows == SLOT_BYTES // (4 * 2048)
    greedy = Layout.of(MAX_SLOTS, MAX_BYTES, 7168)
    assert greedy.possible and MAX_BYTES - greedy.bytes < MAX_SLOTS * 2 * (4 * 7168 + 2 * shared_rows._PAGE)
    for impossible in (
        greedy._replace(rows=greedy.rows + 1),
        Layout(0, 1, 1),
        Layout(MAX_SLOTS + 1, 1, 1),
        Layout(1, 0, 1),
    ):
        assert not impossible.possible
    assert not Layout.of(0, SLOT_BYTES, 8).possible
    assert not Layout.of(1, 7, 8).possible


@pytest.mark.parametrize(("error", "usable"), [(errno.ENOMEM, False), (errno.EFAULT, False), (errno.EINVAL, True)])
def test_a_slot_without_memory_is_not_used(error: int, usable: bool) -> None:
    """EINVAL: an older kernel, which cannot be asked."""

    class Memory(bytearray):
        def madvise(self, *args: int) -> None:
            raise OSError(error, os.strerror(error))

    layout = Layout(1, 2, 3)
    assert SharedRows(Memory(layout.bytes), layout).ready(0) is usable  # type: ignore[arg-type]


class Pins:
    """Addresses and sizes of what is pinned; undoing writes to the memory, which must still be there."""

    def __init__(self) -> None:
        self.now: dict[int, int] = {}
        self.undone = 0

    def __call__(self, memory: npt.NDArray[np.uint8]) -> Callable[[], None]:
        address = memory.ctypes.data
        assert address not in self.now
        self.now[address] = memory.nbytes

        def undo() -> None:
            memory[:] = 7
            del self.now[address]
            self.undone += 1

        return undo


def test_a_slot_is_pinned_at_its_first_use_and_whole(offer: Offer) -> None:
    pins = Pins()
    mine = offer.accepted(Layout(3, 5, 24), pins)
    assert mine is not None and not pins.now
    assert all(mine.ready(slot) for slot in (2, 0, 2))
    ends = {s: (mine.sent[s].ctypes.data, mine.answered[s].ctypes.data + mine.answered[s].nbytes) for s in (0, 2)}
    for (address, size), (start, end) in zip(sorted(pins.now.items()), ends.values(), strict=True):
        assert address == start and end <= address + size and size % shared_rows._PAGE == 0
    (first, size), (second, _) = sorted(pins.now.items())
    assert first + size <= second, "no page is pinned twice"
    mine.close()
    mine.close()
    assert not pins.now


@pytest.mark.parametrize("view_is_kept", [True, False])
def test_memory_is_not_given_back_pinned(offer: Offer, view_is_kept: bool) -> None:
    pins = Pins()
    mine = offer.accepted(SMALL, pins)
    assert mine is not None and mine.ready(1)
    view = mine.sent[1] if view_is_kept else None
    del mine
    gc.collect()
    assert not pins.now
    assert view is None or view.view(np.uint8).max() == 7


def test_an_offer_ends_when_it_is_withdrawn(offer: Offer) -> None:
    mine = accepted(offer, SMALL)
    assert SharedRows.open(offer.text, SMALL) is not None
    offer.withdraw()
    assert SharedRows.open(offer.text, SMALL) is None
    mine.sent[0][:] = 1  # who has it keeps it


@pytest.mark.parametrize("text", ["", "1", "1:2:3", "../../etc/passwd", "0:1:" + "0" * 32, "{pid}:999999:" + "0" * 32])
def test_an_offer_that_is_none_opens_nothing(text: str) -> None:
    assert SharedRows.open(text.format(pid=os.getpid()), SMALL) is None


def test_an_impossible_layout_opens_nothing(offer: Offer) -> None:
    assert SharedRows.open(offer.text, SMALL._replace(slots=MAX_SLOTS + 1)) is None


def test_another_file_than_the_one_meant_opens_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    nonce = "0" * 32
    read, write = os.pipe()
    with path.open("r+b") as file:
        for fd in (file.fileno(), read, write):
            assert SharedRows.open(f"{os.getpid()}:{fd}:{nonce}", SMALL) is None
        file.truncate(MAX_BYTES)  # the right size, but not the nonce inside
        assert SharedRows.open(f"{os.getpid()}:{file.fileno()}:{nonce}", SMALL) is None
    os.close(read)
    os.close(write)


def test_no_such_memory_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    assert Offer.make() is None
