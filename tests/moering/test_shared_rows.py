"""Memory that two processes share: both see the rows, its name goes at once, and nothing else can be opened as one."""

import os
import subprocess
import sys

import numpy as np
import pytest

from moering import shared_rows
from moering.shared_rows import DIRECTORY, SLOTS, SharedRows


def names() -> set[str]:
    return {p.name for p in DIRECTORY.glob("moering-*")}


def test_another_process_sees_the_rows_and_answers() -> None:
    mine = SharedRows.create(8)
    assert mine is not None
    mine.sent[1][:3] = np.arange(24).reshape(3, 8)
    code = f"""
from moering.shared_rows import SharedRows
s = SharedRows.open({mine.name!r}, 8)
s.answered[1][:3] = s.sent[1][:3] * 2
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (mine.answered[1][:3] == 2 * np.arange(24).reshape(3, 8)).all()
    assert mine.name not in names()


def test_slots_do_not_overlap() -> None:
    s = SharedRows.create(12)
    assert s is not None
    shared_rows.forget(s.name)
    for i, rows in enumerate([*s.sent, *s.answered]):
        rows[:] = i
    assert [float(rows.min()) for rows in [*s.sent, *s.answered]] == list(range(2 * SLOTS))


@pytest.mark.parametrize("name", ["", "moering-1", "../../etc/passwd", "moering-" + "0" * 32, "moering-" + "G" * 32])
def test_a_name_that_is_none_opens_nothing(name: str) -> None:
    assert SharedRows.open(name, 8) is None


@pytest.mark.parametrize("content", [b"", b"x" * 4096])
def test_a_file_that_is_no_segment_opens_nothing_and_stays(content: bytes) -> None:
    path = DIRECTORY / ("moering-" + "a1" * 16)
    path.write_bytes(content)
    try:
        assert SharedRows.open(path.name, 8) is None
        os.truncate(path, shared_rows._SIZE)
        assert SharedRows.open(path.name, 8) is None  # the right size, but not the name inside
        assert path.exists()
    finally:
        path.unlink()


def test_no_shared_memory_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(shared_rows, "DIRECTORY", tmp_path / "nowhere")
    assert SharedRows.create(8) is None
