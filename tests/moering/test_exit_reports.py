from __future__ import annotations

import errno
from pathlib import Path

import pytest
import zmq

from moering import protocol, transport
from moering.exit_reports import ExitReports
from moering.leader import Seat
from moering.protocol import ProvenExit


class Moving:
    """A finder whose seat the test changes."""

    def __init__(self) -> None:
        self.seat: Seat | None = None

    def start(self, changed: object) -> None: ...

    def close(self) -> None: ...


def received(socket: zmq.Socket[bytes], count: int) -> list[ProvenExit]:
    messages = []
    for _ in range(count):
        assert socket.poll(5000), messages
        messages.append(protocol.decode(socket.recv_multipart()[1:])[0])
    return messages


def test_a_new_coordinator_hears_of_the_exits_before_it(tmp_path: Path) -> None:
    coordinator, exits = Moving(), [ProvenExit("e0", 1, -9), ProvenExit("e1", 2, 0), ProvenExit("e2", 3, 1)]
    reports = ExitReports(coordinator)
    sockets = [transport.make_socket(zmq.ROUTER) for _ in range(2)]
    first, second = (Seat(transport.bind(s, f"ipc://{tmp_path}/{i}"), i) for i, s in enumerate(sockets))
    try:
        reports.follow()
        reports.send(exits[0])  # nobody is elected yet
        coordinator.seat = first
        reports.follow()
        reports.send(exits[1])
        assert received(sockets[0], 2) == exits[:2]
        coordinator.seat = second
        reports.follow()
        reports.follow()
        reports.send(exits[2])
        assert received(sockets[1], 3) == exits
        assert not sockets[0].poll(0) and not sockets[1].poll(0)
    finally:
        reports.close()
        for s in sockets:
            s.close()


@pytest.mark.parametrize(
    ("what", "error"), [("resolve", OSError("no name server")), ("make_socket", zmq.ZMQError(errno.EMFILE))]
)
def test_a_coordinator_that_cannot_be_connected_to_for_a_moment_hears_of_the_exits_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, error: Exception
) -> None:
    coordinator, exits = Moving(), [ProvenExit(f"e{n}", n, -9) for n in range(3)]
    reports, socket = ExitReports(coordinator), transport.make_socket(zmq.ROUTER)
    address = transport.bind(socket, f"ipc://{tmp_path}/c")

    def fail(*args: object, **options: object) -> None:
        raise error

    try:
        reports.send(exits[0])
        coordinator.seat = Seat(address)
        with monkeypatch.context() as short:
            short.setattr(transport, what, fail)
            reports.follow()
            reports.send(exits[1])
        reports.send(exits[2])
        assert received(socket, 3) == exits
    finally:
        reports.close()
        socket.close()
