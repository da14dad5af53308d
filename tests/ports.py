"""TCP ports for processes that a test starts, and starts again."""

from __future__ import annotations

import socket

_held: list[socket.socket] = []


def free_port() -> int:
    """One that nobody else is given while this process lives, also not while who listens there is down.

    It is bound here without listening. Whoever listens with SO_REUSEADDR, as servers do, can have it all the same.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    _held.append(held)
    return int(held.getsockname()[1])
