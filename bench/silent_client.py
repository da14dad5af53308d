"""HTTP clients that send a request and never read a byte of the answer."""

from __future__ import annotations

import json
import select
import socket
import time
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

RECEIVE_BUFFER_BYTES = 4096  # the kernel's least is a little more


class SilentClients:
    """Connections that are kept until the server resets them. Close them by leaving the context."""

    def __init__(self, url: str, body: dict[str, Any], count: int) -> None:
        """Connect and send the request `count` times."""
        self.cut_at_s: list[float] = []
        self._poll = select.poll()
        self._sockets: dict[int, socket.socket] = {}
        for _ in range(count):
            s = _send(url, json.dumps(body).encode())
            self._sockets[s.fileno()] = s
            self._poll.register(s, 0)  # errors and resets only: data is there all the time

    @property
    def open(self) -> int:
        """Connections that the server has not reset yet."""
        return len(self._sockets)

    def look(self) -> None:
        """Note who was reset since the last look."""
        for fd, _ in self._poll.poll(0):
            self.cut_at_s.append(time.perf_counter())
            self._close(fd)

    def __enter__(self) -> SilentClients:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        for fd in list(self._sockets):
            self._close(fd)

    def _close(self, fd: int) -> None:
        self._poll.unregister(fd)
        self._sockets.pop(fd).close()


def _send(url: str, body: bytes) -> socket.socket:
    parts = urlsplit(url)
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)  # before connecting: it bounds the window
    s.connect((parts.hostname, parts.port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    s.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return s
