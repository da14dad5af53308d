"""Two pipes between a router and an expert server of one machine, for messages about rows in memory that both share.

A message through zmq wakes four threads on its way there and back that do nothing else, a pipe wakes none but the one
that waits for it. The router makes the pipes, and offers with its hello where their ends are to be found; the server
opens them through `/proc`. A pipe ends when the other end's process does, however that went. What does not fit, and
what finds the pipe full, goes through zmq, as everything does where there is no doorbell.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import stat

from moering.shared_rows import MAX_SLOTS

PACKET_BYTES = select.PIPE_BUF
"""A longer packet could be torn apart."""
_OFFER = re.compile(r"([1-9][0-9]{0,9}):([0-9]{1,7}):([0-9]{1,20}):([0-9]{1,7}):([0-9]{1,20})")
_PACKETS = getattr(os, "O_DIRECT", 0) if hasattr(fcntl, "F_SETPIPE_SZ") else 0  # a read gets what one write gave
_CAPACITY = MAX_SLOTS * PACKET_BYTES  # a packet takes a page


class Doorbell:
    """One end, for one thread."""

    def __init__(self, receives: int, sends: int) -> None:
        """Of two descriptors, which it closes in the end."""
        self.fd, self._sends = receives, sends
        self.hung_up = False  # seen by `receive`: the other end is gone, and all that it sent has been received

    @classmethod
    def open(cls, offer: str) -> Doorbell | None:
        """The server's end of what is offered; None where it cannot be opened or is not what was meant."""
        parts = _OFFER.fullmatch(offer)
        if parts is None:
            return None
        process, dispatches, dispatches_inode, replies, replies_inode = map(int, parts.groups())
        with contextlib.ExitStack() as stack:
            try:
                receives = _open_pipe(process, dispatches, dispatches_inode, os.O_RDONLY)
                stack.callback(os.close, receives)
                sends = _open_pipe(process, replies, replies_inode, os.O_WRONLY)
                stack.callback(os.close, sends)
                _prepare(sends)
            except OSError:
                return None
            stack.pop_all()
        return cls(receives, sends)

    def send(self, packet: bytes | memoryview) -> bool:
        """False where it has to go another way: too long, no room, nobody there."""
        if len(packet) > PACKET_BYTES:
            return False
        try:
            os.write(self._sends, packet)
        except (BlockingIOError, BrokenPipeError):
            return False
        return True

    def receive(self) -> bytes | None:
        """The next packet, if one is waiting."""
        try:
            packet = os.read(self.fd, PACKET_BYTES)
        except BlockingIOError:
            return None
        self.hung_up = not packet
        return packet or None

    def close(self) -> None:
        """Hang up."""
        os.close(self.fd)
        os.close(self._sends)


class DoorbellOffer:
    """The pipes, before anybody has opened their other ends. `text` is for the router's hello."""

    def __init__(self, dispatches: tuple[int, int], replies: tuple[int, int]) -> None:
        """Of the two pipes' ends: for reading, for writing."""
        self._theirs: tuple[int, ...] = (dispatches[0], replies[1])
        self._mine: tuple[int, ...] = (replies[0], dispatches[1])
        named = (f"{fd}:{os.fstat(fd).st_ino}" for fd in self._theirs)
        self.text = ":".join((str(os.getpid()), *named))

    @classmethod
    def make(cls) -> DoorbellOffer | None:
        """A new one; None where there are no such pipes."""
        if not _PACKETS:
            return None
        pipes = []
        try:
            for _ in range(2):
                pipes.append(os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK))
                _prepare(pipes[-1][1])
            return cls(*pipes)
        except OSError:
            for fd in (fd for pipe in pipes for fd in pipe):
                os.close(fd)
            return None

    def accepted(self) -> Doorbell:
        """The router's end: the server has opened its own. Ends the offer."""
        mine, self._mine = self._mine, ()
        self.withdraw()
        return Doorbell(*mine)

    def withdraw(self) -> None:
        """Nobody else may open it from now on."""
        for fd in (*self._theirs, *self._mine):
            os.close(fd)
        self._theirs = self._mine = ()


def _open_pipe(process: int, fd: int, inode: int, mode: int) -> int:
    """An end of a pipe of another process. Raises `OSError` also where another thing is there by now."""
    opened = os.open(f"/proc/{process}/fd/{fd}", mode | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(opened)
    if not stat.S_ISFIFO(status.st_mode) or status.st_ino != inode:
        os.close(opened)
        raise OSError(f"descriptor {fd} of process {process} is not the pipe that was offered")
    return opened


def _prepare(fd: int) -> None:
    """Have what is written here read packet by packet, and as much room as all slots need."""
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | _PACKETS)
    with contextlib.suppress(OSError):  # a user's pipes may have used up what is allowed: then some go through zmq
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _CAPACITY)
