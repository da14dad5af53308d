"""Who is connected to the routers' socket, as libzmq's own thread reports it."""

from __future__ import annotations

import threading
import time
from typing import Any

import zmq

from moering import transport


class Connections(threading.Thread):
    """Follows the connections of a listening socket until that is closed, and logs whom it refuses.

    On a thread of its own: the one that serves routers blocks in a receive, and libzmq's would wait for a reader.
    """

    def __init__(self, socket: Any) -> None:
        super().__init__(name="connections", daemon=True)
        self._monitor = transport.watch_connections(socket)
        self.open: set[int] = set()  # by file descriptor
        self._ended_s = time.monotonic()

    @property
    def gone_for_s(self) -> float:
        """Seconds since the last connection ended; 0 while any is open. May be read by any thread."""
        return 0.0 if self.open else time.monotonic() - self._ended_s

    def run(self) -> None:
        """The thread's loop."""
        with self._monitor:
            while (event := transport.next_event(self._monitor)).kind != zmq.EVENT_MONITOR_STOPPED:
                if event.kind == zmq.EVENT_ACCEPTED:
                    self.open.add(event.value)
                elif event.kind == zmq.EVENT_DISCONNECTED:
                    self._ended_s = time.monotonic()
                    self.open.discard(event.value)
