"""Asks whether a zmq endpoint is served, without a thread and without a zmq socket.

Only a process whose libzmq runs sends the ZMTP greeting; a stopped one lets the kernel accept and then says nothing; at
a dead one's address nobody listens. Names are not resolved here (that would block): an address with one stays unjudged.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from ipaddress import ip_address

TIMEOUT_S = 1.0


class EndpointProbe:
    """One attempt to get a greeting from an endpoint. Poll `fd` for reading, then ask `answer`."""

    def __init__(self, address: str, now_s: float) -> None:
        self._until_s = now_s + TIMEOUT_S
        self._answer: str | None = None
        scheme, _, rest = address.partition("://")
        family = socket.AF_UNIX if scheme == "ipc" else socket.AF_INET
        target: str | tuple[str, int] = rest
        if scheme == "tcp":
            host, _, port = rest.rpartition(":")
            host = host.strip("[]")
            family = socket.AF_INET6 if ip_address(host).version == 6 else socket.AF_INET
            target = host, int(port)
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        self._note(self._socket.connect_ex(target))

    @property
    def fd(self) -> int:
        """The descriptor to poll."""
        return self._socket.fileno()

    def answer(self, now_s: float) -> str | None:
        """ "answered", "refused" or "silent"; None while it is not known."""
        if self._answer is None:
            try:
                self._answer = "answered" if self._socket.recv(16) else "silent"
            except BlockingIOError:
                pass
            except OSError as e:
                self._note(e.errno or errno.EIO)
        if self._answer is None and now_s >= self._until_s:
            self._answer = "silent"
        return self._answer

    def close(self) -> None:
        """Give the descriptor back."""
        with contextlib.suppress(OSError):
            self._socket.close()

    def _note(self, error: int) -> None:
        if error in (errno.ECONNREFUSED, errno.ENOENT):
            self._answer = "refused"
        elif error not in (0, errno.EINPROGRESS, errno.EAGAIN, errno.ENOTCONN):
            self._answer = "silent"
