"""Pipes between two processes: packets arrive whole, an end of a process is seen, and nothing else is opened as one."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moering import doorbell
from moering.doorbell import PACKET_BYTES, Doorbell, DoorbellOffer
from moering.shared_rows import MAX_SLOTS


@pytest.fixture
def offer() -> Iterator[DoorbellOffer]:
    made = DoorbellOffer.make()
    assert made is not None
    yield made
    made.withdraw()


@pytest.fixture
def ends(offer: DoorbellOffer) -> Iterator[tuple[Doorbell, Doorbell]]:
    """The router's and the server's, in one process."""
    server = Doorbell.open(offer.text)
    assert server is not None
    router = offer.accepted()
    yield router, server
    for end in (router, server):
        if not end.hung_up:
            end.close()


def waited(bell: Doorbell) -> bytes | None:
    """What comes next, a hang-up being None."""
    readable, _, _ = select.select([bell.fd], [], [], 20.0)
    assert readable, "nothing came"
    return bell.receive()


def over(bell: Doorbell) -> bool:
    return bell.hung_up


def pipes() -> int:
    return sum(os.path.realpath(fd).rpartition("/")[2].startswith("pipe:") for fd in Path("/proc/self/fd").iterdir())


def test_each_packet_arrives_by_itself_and_whole(ends: tuple[Doorbell, Doorbell]) -> None:
    packets = [b"a", bytes(range(256)) * (PACKET_BYTES // 256), b"c" * 17]
    for here, there in (ends, ends[::-1]):
        assert all(here.send(packet) for packet in packets)
        assert [there.receive() for _ in packets] == packets
        assert there.receive() is None and not there.hung_up


def test_a_process_that_is_killed_hangs_up_after_all_that_it_sent(offer: DoorbellOffer) -> None:
    code = f"""
import os, select, signal
from moering.doorbell import Doorbell
bell = Doorbell.open({offer.text!r})
assert bell.send(b"ready")
select.select([bell.fd], [], [])
assert bell.send(bell.receive() + b" back") and bell.send(b"last")
os.kill(os.getpid(), signal.SIGKILL)
"""
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        select.select([offer._mine[0]], [], [], 20.0)
        bell = offer.accepted()
        assert waited(bell) == b"ready"
        assert bell.send(b"there and")
        assert waited(bell) == b"there and back" and not over(bell)
        assert process.wait(20) == -signal.SIGKILL
        assert waited(bell) == b"last"
        assert waited(bell) is None and over(bell)
        assert not bell.send(b"nobody")
        bell.close()


def test_what_a_pipe_does_not_take_has_to_go_another_way(ends: tuple[Doorbell, Doorbell]) -> None:
    router, server = ends
    assert not router.send(bytes(PACKET_BYTES + 1))
    taken = 0
    while router.send(b"x"):
        taken += 1
    assert taken >= 16, "less than Linux gives any pipe"
    assert server.receive() == b"x" and router.send(b"y"), "room again"


def test_a_pipe_has_room_for_a_packet_of_each_slot(ends: tuple[Doorbell, Doorbell]) -> None:
    for here, there in (ends, ends[::-1]):
        assert all(here.send(bytes(PACKET_BYTES)) for _ in range(MAX_SLOTS))
        assert all(there.receive() is not None for _ in range(MAX_SLOTS))


def test_an_offer_ends_when_it_is_withdrawn(offer: DoorbellOffer) -> None:
    before = pipes()
    offer.withdraw()
    assert pipes() == before - 4
    assert Doorbell.open(offer.text) is None


def test_both_ends_closed_leave_nothing(offer: DoorbellOffer) -> None:
    before = pipes()
    server = Doorbell.open(offer.text)
    assert server is not None
    router = offer.accepted()
    router.close()
    assert server.receive() is None and server.hung_up
    server.close()
    assert pipes() == before - 4


@pytest.mark.parametrize("text", ["", "1", "1:2:3:4", "../../etc:1:1:1:1", "0:1:1:1:1", "{pid}:999999:1:999998:1"])
def test_an_offer_that_is_none_opens_nothing(text: str) -> None:
    assert Doorbell.open(text.format(pid=os.getpid())) is None


def test_other_things_than_the_pipes_that_were_meant_open_nothing(offer: DoorbellOffer, tmp_path: Path) -> None:
    pid, fd, inode, other_fd, other_inode = offer.text.split(":")
    read, write = os.pipe()
    with (tmp_path / "file").open("w+b") as file:
        before = pipes()
        for wrong in (read, write, file.fileno()):
            assert Doorbell.open(f"{pid}:{wrong}:{inode}:{other_fd}:{other_inode}") is None
            assert Doorbell.open(f"{pid}:{fd}:{inode}:{wrong}:{other_inode}") is None
            assert Doorbell.open(f"{pid}:{file.fileno()}:{os.fstat(file.fileno()).st_ino}:{fd}:{inode}") is None
        assert pipes() == before, "nothing stays open"
    os.close(read)
    os.close(write)


def test_no_such_pipes_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doorbell, "_PACKETS", 0)
    assert DoorbellOffer.make() is None
