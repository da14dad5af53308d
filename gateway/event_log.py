"""The timeline as this gateway shows it: the coordinators' events, the last ones, in the order in which they came."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterable

from moering.protocol import Event

KEPT = 1000


class EventLog:
    """For the event loop. A new coordinator's events follow those of the one before."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=KEPT)
        self._changed = asyncio.Event()

    def add(self, events: Iterable[Event]) -> None:
        """Take in what is not known yet."""
        known = {e.id for e in self._events}
        self._events.extend(e for e in events if e.id not in known)
        self._changed.set()
        self._changed = asyncio.Event()

    def after(self, event_id: int) -> list[Event]:
        """What came after the event with this id, and is still remembered."""
        return [e for e in self._events if e.id > event_id]

    async def wait(self, timeout_s: float) -> None:
        """Until something comes, or for so long."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)
