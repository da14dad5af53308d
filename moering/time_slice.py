"""Linux's time slice of a thread, which Python has no call for."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import struct
from collections.abc import Iterator

SHORT_NS = 100_000
_SYSCALLS = {"x86_64": (314, 315), "aarch64": (274, 275)}  # sched_setattr, sched_getattr
_ATTR = struct.Struct("<IIQiIQQQ")  # size, policy, flags, nice, priority, runtime (the slice), deadline, period
SLICE = 5  # of these


@contextlib.contextmanager
def short_slice() -> Iterator[None]:
    """Give the calling thread, and the threads that it starts meanwhile, a slice of 0.1 ms. Does nothing elsewhere."""
    before = attributes()
    if before is None:
        yield
        return
    _set((*before[:SLICE], SHORT_NS, *before[SLICE + 1 :]))
    try:
        yield
    finally:
        _set(before)


def attributes(thread: int = 0) -> tuple[int, ...] | None:
    """How Linux schedules a thread of this process (0: the calling one), its slice at `SLICE`; None elsewhere."""
    numbers = _SYSCALLS.get(platform.machine())
    if platform.system() != "Linux" or numbers is None:
        return None
    buffer = ctypes.create_string_buffer(_ATTR.size)
    if ctypes.CDLL(None).syscall(numbers[1], thread, buffer, _ATTR.size, 0) != 0:
        return None
    return _ATTR.unpack(buffer.raw)


def _set(attributes: tuple[int, ...]) -> None:
    ctypes.CDLL(None).syscall(_SYSCALLS[platform.machine()][0], 0, _ATTR.pack(*attributes), 0)
