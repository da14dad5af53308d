"""Cuts off clients that do not read. What they cost until then is bounded by the buffers of one connection."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Watched:
    """One response under watch. `sent_bytes` is what was given to the transport so far."""

    transport: asyncio.Transport
    since: float  # of the last progress, on the loop's clock
    sent_bytes: int = 0
    taken_bytes: int = 0  # what had left the transport's buffer at the last progress


class StallGuard:
    """Looks at all watched connections several times per `timeout_s`."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._watched: set[Watched] = set()
        self.cut_count = 0

    @contextlib.contextmanager
    def watch(self, transport: asyncio.Transport) -> Iterator[Watched]:
        """Abort the connection when it makes no progress while there is something to write."""
        watched = Watched(transport, asyncio.get_running_loop().time())
        self._watched.add(watched)
        try:
            yield watched
        finally:
            self._watched.discard(watched)

    async def run(self) -> None:
        """The guard's task."""
        while True:
            await asyncio.sleep(self._timeout_s / 8)
            self.check(asyncio.get_running_loop().time())

    def check(self, now: float) -> None:
        """Cut off who has stalled by `now`."""
        for watched in list(self._watched):
            if self._stalled(watched, now):
                self.cut_count += 1
                self._watched.discard(watched)
                logger.warning("a client read nothing for %.1f s; its connection is cut", now - watched.since)
                _reset(watched.transport)

    def _stalled(self, watched: Watched, now: float) -> bool:
        buffered = watched.transport.get_write_buffer_size()
        taken = watched.sent_bytes - buffered
        if buffered == 0 or taken > watched.taken_bytes:
            watched.taken_bytes, watched.since = taken, now
        return now - watched.since >= self._timeout_s


def _reset(transport: asyncio.Transport) -> None:
    """Close without delivering what is left: else the kernel would keep its send buffer for minutes."""
    connection = transport.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
