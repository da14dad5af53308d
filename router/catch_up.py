"""A sign between the routers of one machine, a lock on a file: one of them catches up with interrupted streams.

All who catch up share the lock. A router that only starts waits until nobody has it: what it takes of the cores, the
clients of those streams would wait for. The system gives up the lock of a process that dies, so nobody has to tidy up.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable

from moering.errors import ConfigError

LOOK_S = 0.05
"""Between two looks of one who waits."""
HEARD_S = 0.1
"""A router that gets the streams of a dead one has heard of it by then: sooner nobody looks."""


class CatchUp:
    """One process's end of the sign, in the file `path`, which is made; with "" it does nothing. For one thread.

    Raises `ConfigError` where the file cannot be made.
    """

    def __init__(self, path: str) -> None:
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600) if path else None
        except OSError as e:
            raise ConfigError(f"--catch-up-lock {path}: {e.strerror}") from e
        self._told = False

    def tell(self, catching_up: bool) -> None:
        """Whether this process catches up. Never blocks: who looks just now holds the lock for a moment, and it is to
        be told again."""
        if self._fd is not None and catching_up != self._told and self._lock(fcntl.LOCK_SH, catching_up):
            self._told = catching_up

    def wait(self, at_most_s: float, sleep: Callable[[float], None] = time.sleep) -> float:
        """Wait until no other process catches up, but not longer than `at_most_s`; returns the seconds slept."""
        waited_s, step_s = 0.0, HEARD_S
        while waited_s < at_most_s:
            sleep(step_s)
            waited_s, step_s = waited_s + step_s, LOOK_S
            if self._fd is None or self._lock(fcntl.LOCK_EX, True):
                break
        self.close()
        return waited_s

    def close(self) -> None:
        """Give up the lock, and the file. Idempotent."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _lock(self, kind: int, on: bool) -> bool:
        assert self._fd is not None
        try:
            fcntl.flock(self._fd, kind | fcntl.LOCK_NB if on else fcntl.LOCK_UN)
        except BlockingIOError:
            return False
        return True
