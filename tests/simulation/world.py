"""Virtual time: a queue of events, and processes that can be killed, stopped and continued.

One `random.Random` decides everything that is left to chance, so a seed gives the same run everywhere. Nothing here or
above may iterate over a set of strings or read a clock.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from typing import Any

TRACE_LINES = 400


class Violation(AssertionError):
    """Something happened that must never happen."""


class World:
    """The clock, the events to come, and the trace of those that were."""

    def __init__(self, seed: str, *, tracing: bool = False) -> None:
        self.now_s = 0.0
        self.rng = random.Random(seed)
        self.events = 0
        self.tracing = tracing
        self.trace: deque[str] = deque(maxlen=None if tracing else TRACE_LINES)
        self._queue: list[tuple[float, int, Process | None, Callable[..., None], tuple[Any, ...]]] = []
        self._scheduled = 0

    def after(self, delay_s: float, process: Process | None, action: Callable[..., None], *args: Any) -> None:
        """Do something later; if it belongs to a process, only when that is alive and runs."""
        self._scheduled += 1
        heapq.heappush(self._queue, (self.now_s + delay_s, self._scheduled, process, action, args))

    def run(self, until_s: float) -> None:
        """Let time pass."""
        queue = self._queue
        while queue and queue[0][0] <= until_s:
            self.now_s, _, process, action, args = heapq.heappop(queue)
            self.events += 1
            if process is None:
                action(*args)
            else:
                process.do(action, *args)
        self.now_s = until_s

    def note(self, what: str) -> None:
        """A line of the trace."""
        self.trace.append(f"{self.now_s:9.4f} {what}")


class Process:
    """One process. It is dead for ever once it was killed; a restart is another object."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.alive, self.stopped = True, False
        self.ends: dict[Any, None] = {}  # its ends of open connections, in the order of their making
        self._backlog: list[tuple[Callable[..., None], tuple[Any, ...]]] = []

    def after(self, delay_s: float, action: Callable[..., None], *args: Any) -> None:
        """Do something later, if this process is still alive then."""
        self.world.after(delay_s, self, action, *args)

    def do(self, action: Callable[..., None], *args: Any) -> None:
        """Do it now, or when the process is continued."""
        if not self.alive:
            return
        if self.stopped:
            self._backlog.append((action, args))
        else:
            action(*args)

    def resume(self) -> None:
        """SIGCONT: everything that came meanwhile is there at once."""
        self.stopped = False
        backlog, self._backlog = self._backlog, []
        for action, args in backlog:
            self.do(action, *args)

    # What the network calls; the kinds of process say what it means to them.

    def received(self, end: Any, message: Any) -> None:
        """A message arrived at one of its ends."""

    def lost(self, end: Any) -> None:
        """One of its connections is over."""
