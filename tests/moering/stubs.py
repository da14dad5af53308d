"""Starting stub processes, and waiting for what they report, without sleeping."""

from __future__ import annotations

import json
import os
import select
import socket
import sys
from pathlib import Path

from moering.supervisor import Command

DEADLINE_S = 60.0


def stub(
    directory: Path, server_id: str, kind: str = "", behaviour: str = "serve", *, preload: bool = False
) -> Command:
    """A command whose process reports to the `Mailbox` of `directory`. With `preload`, PYTHONPATH must name `REPO`."""
    module = [sys.executable, "-m", "tests.moering.stub_process", server_id]

    def argv(start: int) -> list[str]:
        return [*module, str(start), str(directory), behaviour]

    return Command(server_id, kind or server_id, argv, preload=preload)


class Mailbox:
    """Where the stub processes of a directory report, and where it shows whether any of them is alive."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(directory / "mailbox"))
        self.socket.settimeout(DEADLINE_S)
        os.mkfifo(directory / "alive")
        # A writer of our own keeps the FIFO from its end of file until all processes had the time to open it.
        self._alive = os.open(directory / "alive", os.O_RDONLY | os.O_NONBLOCK)
        self._writer: int | None = os.open(directory / "alive", os.O_WRONLY)

    def next(self) -> tuple[str, str, int, int]:
        """The next report: id, event, number of the start, pid."""
        server_id, event, start, pid = json.loads(self.socket.recv(1 << 12))
        return server_id, event, start, pid

    def started(self, count: int = 1) -> dict[str, tuple[int, int]]:
        """The (start, pid) of the next `count` processes by id; nothing but starts may be reported meanwhile."""
        processes = {}
        for _ in range(count):
            server_id, event, start, pid = self.next()
            assert event == "started"
            processes[server_id] = (start, pid)
        return processes

    def rest(self) -> list[tuple[str, str]]:
        """What has been reported by now, as (id, event)."""
        self.socket.setblocking(False)
        reports = []
        try:
            while True:
                reports.append(self.next()[:2])
        except BlockingIOError:
            return reports
        finally:
            self.socket.settimeout(DEADLINE_S)

    def all_dead(self, within_s: float) -> bool:
        """Whether every process that ever reported is dead, or dies in time."""
        if self._writer is not None:
            os.close(self._writer)
            self._writer = None
        poll = select.poll()
        poll.register(self._alive, select.POLLHUP)
        return bool(poll.poll(within_s * 1000))

    def close(self) -> None:
        self.socket.close()
        os.close(self._alive)
        if self._writer is not None:
            os.close(self._writer)
