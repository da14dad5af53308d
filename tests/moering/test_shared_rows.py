"""Memory that two processes share: both see the rows, nothing is left of it, and nothing else can be opened as one."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moering import shared_rows
from moering.shared_rows import SLOTS, SharedRows


@pytest.fixture
def mine():  # type: ignore[no-untyped-def]
    segment = SharedRows.create(8)
    assert segment is not None
    yield segment
    segment.withdraw()


def test_another_process_sees_the_rows_and_answers(mine: SharedRows) -> None:
    mine.sent[1][:3] = np.arange(24).reshape(3, 8)
    code = f"""
from moering.shared_rows import SharedRows
s = SharedRows.open({mine.offer!r}, 8)
s.answered[1][:3] = s.sent[1][:3] * 2
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (mine.answered[1][:3] == 2 * np.arange(24).reshape(3, 8)).all()


def test_slots_do_not_overlap(mine: SharedRows) -> None:
    for i, rows in enumerate([*mine.sent, *mine.answered]):
        rows[:] = i
    assert [float(rows.min()) for rows in [*mine.sent, *mine.answered]] == list(range(2 * SLOTS))


def test_an_offer_ends_when_it_is_withdrawn(mine: SharedRows) -> None:
    assert SharedRows.open(mine.offer, 8) is not None
    mine.withdraw()
    assert SharedRows.open(mine.offer, 8) is None
    mine.sent[0][:] = 1  # who has it keeps it


@pytest.mark.parametrize(
    "offer", ["", "1", "1:2:3", "../../etc/passwd", "0:1:" + "0" * 32, f"{os.getpid()}:999999:" + "0" * 32]
)
def test_an_offer_that_is_none_opens_nothing(offer: str) -> None:
    assert SharedRows.open(offer, 8) is None


def test_another_file_than_the_one_meant_opens_nothing(mine: SharedRows, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    nonce = mine.offer.rpartition(":")[2]
    read, write = os.pipe()
    with path.open("r+b") as file:
        for fd in (file.fileno(), read, write):
            assert SharedRows.open(f"{os.getpid()}:{fd}:{nonce}", 8) is None
        file.truncate(shared_rows._SIZE)  # the right size, but not the nonce inside
        assert SharedRows.open(f"{os.getpid()}:{file.fileno()}:{nonce}", 8) is None
    os.close(read)
    os.close(write)


def test_no_such_memory_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    assert SharedRows.create(8) is None
