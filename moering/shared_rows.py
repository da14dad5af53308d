"""Rows in memory that a router and an expert server of one machine share; `moering.doorbell` carries the messages.

The router makes a file in memory, without a name, for each connection, and offers with its hello where its descriptor
is to be found and how many slots it needs. The server opens it, checks the nonce inside, and says with its welcome how
many rows a slot holds, which is what its messages need. The file's length is the limit for all; it takes memory slot by
slot, as they are used first. It goes when both ends are gone, however they went. It belongs to one connection, and a
slot to one dispatch until its answer has been read: a server that was given up, and wakes up late, writes to memory
that nobody reads any more. Where the server does not see the router's descriptors (containers, other users), or no slot
is free, rows travel in frames.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import secrets
import stat
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moering.expert_frames import ITEM_BYTES

SLOTS = 4
"""For each micro-batch in flight: more than it usually has outstanding at one server."""
SLOT_BYTES = 256 << 10
"""Of each direction, between CPUs. Larger messages, the chunks of long prompts, travel in frames, which zmq does not
copy."""
MAX_SLOTS = 64
MAX_BYTES = 1 << 30
"""Length of the file. Not a byte of /dev/shm, whose 64 MB in a container do not count here."""
_OFFER = re.compile(r"([1-9][0-9]{0,9}):([0-9]{1,7}):([0-9a-f]{32})")  # process, descriptor, nonce
_PAGE = mmap.PAGESIZE
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14, which Python does not name

ARRAYS: dict[str, npt.DTypeLike] = {"float32": np.float32, "bfloat16": np.int16}
"""What rows are as arrays. numpy has no bfloat16: their bits."""
Rows = npt.NDArray[Any]
Pin = Callable[[npt.NDArray[np.uint8]], Callable[[], None] | None]
"""Prepares memory for a GPU; what it returns undoes that, and has to be called before the memory is given back. None:
it cannot be done."""


class Layout(NamedTuple):
    """What lies where: after a page with the nonce the slots, each of them rows sent, then rows answered."""

    slots: int
    rows: int  # of a slot, in each direction
    columns: int
    dtype: str = "float32"

    @classmethod
    def of(cls, slots: int, slot_bytes: int, columns: int, dtype: str = "float32") -> Layout:
        """So many slots of `slot_bytes` in each direction, or of less where `MAX_BYTES` are too few."""
        most = (MAX_BYTES - _PAGE) // max(1, 2 * slots) // _PAGE * _PAGE
        return cls(slots, min(slot_bytes, most) // (columns * ITEM_BYTES[dtype]), columns, dtype)

    @property
    def part_bytes(self) -> int:
        """Of one direction of a slot: whole pages."""
        return -(-self.rows * self.columns * ITEM_BYTES[self.dtype] // _PAGE) * _PAGE

    @property
    def bytes(self) -> int:
        """Of all."""
        return _PAGE + 2 * self.slots * self.part_bytes

    @property
    def possible(self) -> bool:
        """Whether there may be such memory."""
        return 0 < self.slots <= MAX_SLOTS and self.rows > 0 and self.bytes <= MAX_BYTES


class SharedRows:
    """`sent[slot]` and `answered[slot]`: [layout.rows, columns] each, of the type in `ARRAYS`."""

    def __init__(self, memory: mmap.mmap, layout: Layout, pin: Pin | None = None) -> None:
        """Each slot is given to `pin` when it is used first."""
        self.layout = layout
        self._memory, self._pin = memory, pin
        self._ready: set[int] = set()
        self._unpin: dict[int, Callable[[], Any]] = {}  # by slot
        self.sent = [self._part(2 * slot) for slot in range(layout.slots)]
        self.answered = [self._part(2 * slot + 1) for slot in range(layout.slots)]

    def ready(self, slot: int) -> bool:
        """Take the slot's memory at its first use. False where memory is short: writing there would kill the writer."""
        if slot not in self._ready:
            size = 2 * self.layout.part_bytes
            start = _PAGE + slot * size
            try:
                self._memory.madvise(_POPULATE_WRITE, start, size)
            except OSError as e:
                if e.errno in (errno.ENOMEM, errno.EFAULT):  # else an older kernel: memory comes as it is touched
                    return False
            # The part keeps the memory mapped until it is undone, at the latest when this object is collected.
            if self._pin and (unpin := self._pin(np.frombuffer(self._memory, np.uint8, size, start))) is not None:
                self._unpin[slot] = undo = weakref.finalize(self, unpin)
                undo.atexit = False
            self._ready.add(slot)
        return True

    def is_pinned(self, slot: int) -> bool:
        """Whether a GPU can use the slot's memory as its own."""
        return slot in self._unpin

    def close(self) -> None:
        """No GPU reads or writes here any more, and none will."""
        for undo in self._unpin.values():
            undo()

    @classmethod
    def open(cls, offer: str, layout: Layout, pin: Pin | None = None) -> SharedRows | None:
        """The memory that is offered; None where it cannot be opened or is not the one that was meant."""
        parts = _OFFER.fullmatch(offer)
        if parts is None or not layout.possible:
            return None
        process, descriptor, nonce = parts.groups()
        try:
            # not blocking, in case that the descriptor is by now a pipe
            fd = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return None
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode) or os.fstat(fd).st_size != MAX_BYTES:
                return None
            memory = mmap.mmap(fd, layout.bytes)
        except OSError:
            return None
        finally:
            os.close(fd)
        return cls(memory, layout, pin) if memory[: len(nonce)] == nonce.encode() else None

    def _part(self, index: int) -> Rows:
        _, rows, columns, dtype = self.layout
        start = _PAGE + index * self.layout.part_bytes
        return np.frombuffer(self._memory, ARRAYS[dtype], rows * columns, start).reshape(rows, columns)


class Offer:
    """Memory that a router offers before it knows how much of it the server wants. `text` is for its hello."""

    def __init__(self, fd: int, nonce: str) -> None:
        self.text, self._fd = f"{os.getpid()}:{fd}:{nonce}", fd

    @classmethod
    def make(cls) -> Offer | None:
        """A new one; None where there is no such memory."""
        if not hasattr(os, "memfd_create"):
            return None
        fd, nonce = os.memfd_create("moering-rows", os.MFD_CLOEXEC), secrets.token_hex(16)
        try:
            os.ftruncate(fd, MAX_BYTES)
            os.pwrite(fd, nonce.encode(), 0)
        except OSError:
            os.close(fd)
            return None
        return cls(fd, nonce)

    def accepted(self, layout: Layout, pin: Pin | None = None) -> SharedRows | None:
        """The memory as the server wants it; None where it cannot be mapped."""
        try:
            return SharedRows(mmap.mmap(self._fd, layout.bytes), layout, pin)
        except OSError:
            return None

    def withdraw(self) -> None:
        """Nobody else may open it from now on."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
