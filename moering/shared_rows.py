"""Rows in memory that a router and an expert server of one machine share; zmq carries only the doorbell.

The router makes a segment for each connection and offers it with its hello; the server opens it, checks the name
inside, and accepts with its welcome. From then on the segment has no name: it goes when both ends are gone. It belongs
to one connection, and a slot to one dispatch until its answer arrives: a server that was given up, and wakes up late,
writes to memory that nobody reads any more. Where the ends share no /dev/shm (containers), or no slot is free, rows
travel in frames.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import secrets
from pathlib import Path

import numpy as np
import numpy.typing as npt

DIRECTORY = Path("/dev/shm")
SLOTS = 4
"""More than a router usually has outstanding at one server; what finds no slot free travels in frames."""
SLOT_BYTES = 256 << 10
"""Of each direction. Larger messages, the chunks of long prompts, travel in frames, which zmq does not copy."""
_NAME = re.compile(r"moering-[0-9a-f]{32}")
_PAGE = 4096
_SIZE = _PAGE + 2 * SLOTS * SLOT_BYTES

Rows = npt.NDArray[np.float32]


class SharedRows:
    """`sent[slot]` and `answered[slot]`: float32 [max_rows, columns] each."""

    def __init__(self, memory: mmap.mmap, name: str, columns: int) -> None:
        self.name, self._columns = name, columns
        self._max_rows = rows = SLOT_BYTES // (4 * columns)
        self.sent = [_rows(memory, i, rows, columns) for i in range(SLOTS)]
        self.answered = [_rows(memory, SLOTS + i, rows, columns) for i in range(SLOTS)]

    def fits(self, rows: int, columns: int) -> bool:
        """Whether a slot holds such rows."""
        return rows <= self._max_rows and columns == self._columns

    @classmethod
    def create(cls, columns: int) -> SharedRows | None:
        """A new segment; None where there is no shared memory, or not enough."""
        name = f"moering-{secrets.token_hex(16)}"
        try:
            fd = os.open(DIRECTORY / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError:
            return None
        try:
            os.posix_fallocate(fd, 0, _SIZE)  # now, since writing to a full /dev/shm kills the writer
            memory = mmap.mmap(fd, _SIZE)
        except OSError:
            forget(name)
            return None
        finally:
            os.close(fd)
        memory[: len(name)] = name.encode()
        return cls(memory, name, columns)

    @classmethod
    def open(cls, name: str, columns: int) -> SharedRows | None:
        """The segment of that name, which has no name afterwards; None where it is not the one that was meant."""
        if not _NAME.fullmatch(name):
            return None
        try:
            fd = os.open(DIRECTORY / name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            if os.fstat(fd).st_size != _SIZE:
                return None
            memory = mmap.mmap(fd, _SIZE)
        except OSError:
            return None
        finally:
            os.close(fd)
        if memory[: len(name)] != name.encode():
            return None
        forget(name)
        return cls(memory, name, columns)


def forget(name: str) -> None:
    """Take the name away; whoever has the segment keeps it."""
    with contextlib.suppress(OSError):
        (DIRECTORY / name).unlink()


def _rows(memory: mmap.mmap, index: int, rows: int, columns: int) -> Rows:
    return np.frombuffer(memory, np.float32, rows * columns, _PAGE + index * SLOT_BYTES).reshape(rows, columns)
