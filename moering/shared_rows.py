"""Rows in memory that a router and an expert server of one machine share; zmq carries only the doorbell.

The router makes a segment for each connection, as memory without a name, and offers with its hello where its descriptor
is to be found; the server opens it, checks the nonce inside, and accepts with its welcome. The segment goes when both
ends are gone, however they went. It belongs to one connection, and a slot to one dispatch until its answer arrives: a
server that was given up, and wakes up late, writes to memory that nobody reads any more. Where the server does not see
the router's descriptors (containers, other users), or no slot is free, rows travel in frames.
"""

from __future__ import annotations

import mmap
import os
import re
import secrets
import stat

import numpy as np
import numpy.typing as npt

SLOTS = 4
"""More than a router usually has outstanding at one server; what finds no slot free travels in frames."""
SLOT_BYTES = 256 << 10
"""Of each direction. Larger messages, the chunks of long prompts, travel in frames, which zmq does not copy."""
_OFFER = re.compile(r"([1-9][0-9]{0,9}):([0-9]{1,7}):([0-9a-f]{32})")  # process, descriptor, nonce
_PAGE = 4096
_SIZE = _PAGE + 2 * SLOTS * SLOT_BYTES

Rows = npt.NDArray[np.float32]


class SharedRows:
    """`sent[slot]` and `answered[slot]`: float32 [max_rows, columns] each."""

    def __init__(self, memory: mmap.mmap, columns: int, offer: str = "", fd: int = -1) -> None:
        self.offer, self._fd, self._columns = offer, fd, columns
        self._max_rows = rows = SLOT_BYTES // (4 * columns)
        self.sent = [_rows(memory, i, rows, columns) for i in range(SLOTS)]
        self.answered = [_rows(memory, SLOTS + i, rows, columns) for i in range(SLOTS)]

    def fits(self, rows: int, columns: int) -> bool:
        """Whether a slot holds such rows."""
        return rows <= self._max_rows and columns == self._columns

    @classmethod
    def create(cls, columns: int) -> SharedRows | None:
        """A new segment with its `offer`; None where there is no such memory, or not enough."""
        if not hasattr(os, "memfd_create"):
            return None
        fd = os.memfd_create("moering-rows", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(fd, 0, _SIZE)  # now, since writing where memory is short kills the writer
            memory = mmap.mmap(fd, _SIZE)
        except OSError:
            os.close(fd)
            return None
        nonce = secrets.token_hex(16)
        memory[: len(nonce)] = nonce.encode()
        return cls(memory, columns, f"{os.getpid()}:{fd}:{nonce}", fd)

    @classmethod
    def open(cls, offer: str, columns: int) -> SharedRows | None:
        """The segment that is offered; None where it cannot be opened or is not the one that was meant."""
        parts = _OFFER.fullmatch(offer)
        if parts is None:
            return None
        process, descriptor, nonce = parts.groups()
        try:
            # not blocking, in case that the descriptor is by now a pipe
            fd = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return None
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode) or os.fstat(fd).st_size != _SIZE:
                return None
            memory = mmap.mmap(fd, _SIZE)
        except OSError:
            return None
        finally:
            os.close(fd)
        return cls(memory, columns) if memory[: len(nonce)] == nonce.encode() else None

    def withdraw(self) -> None:
        """Nobody else may open it from now on."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _rows(memory: mmap.mmap, index: int, rows: int, columns: int) -> Rows:
    return np.frombuffer(memory, np.float32, rows * columns, _PAGE + index * SLOT_BYTES).reshape(rows, columns)
