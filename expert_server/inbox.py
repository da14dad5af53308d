"""Where an expert server's messages come from: the zmq socket of all routers, and the doorbells of those near by."""

from __future__ import annotations

from typing import Any

import zmq

from moering import transport
from moering.doorbell import Doorbell


class Inbox:
    """For the compute thread only."""

    def __init__(self, socket: Any) -> None:
        self.gone: list[bytes] = []  # whose doorbell has hung up, by the identity of its connection to `socket`
        self._socket = socket
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._bells: dict[bytes, Doorbell] = {}
        self._at: dict[int, bytes] = {}  # whose doorbell a descriptor is
        self._ready: list[Any] = []

    def open(self, identity: bytes, offer: str) -> bool:
        """Listen to the doorbell that a router offers, if that can be opened."""
        self._close(identity)
        bell = Doorbell.open(offer)
        if bell is None:
            return False
        self._bells[identity], self._at[bell.fd] = bell, identity
        self._poller.register(bell.fd, zmq.POLLIN)
        return True

    def wait(self, timeout_ms: int) -> bool:
        """Wait until `take` has something."""
        self._ready = [source for source, _ in self._poller.poll(timeout_ms)]
        return bool(self._ready)

    def take(self) -> tuple[bytes, list[bytes]] | None:
        """The next message that was there when `wait` ended: identity and frames."""
        while self._ready:
            source = self._ready[-1]
            found = self._from_socket() if source is self._socket else self._from_bell(source)
            if found is not None:
                return found
            self._ready.pop()
        return None

    def answer(self, identity: bytes, packet: bytes) -> bool:
        """Send by way of the doorbell; False where there is none or it cannot take this."""
        bell = self._bells.get(identity)
        return bell is not None and bell.send(packet)

    def close(self) -> None:
        """Hang up all, and close the socket."""
        for identity in list(self._bells):
            self._close(identity)
        self._socket.close()

    def _from_socket(self) -> tuple[bytes, list[bytes]] | None:
        frames = transport.try_receive(self._socket)
        return None if frames is None else (frames[0], frames[1:])

    def _from_bell(self, fd: int) -> tuple[bytes, list[bytes]] | None:
        identity = self._at.get(fd, b"")
        bell = self._bells.get(identity)
        packet = bell.receive() if bell is not None else None  # None: closed since `wait`, for a new one
        if packet is not None:
            return identity, [packet]
        if bell is not None and bell.hung_up:
            self._close(identity)
            self.gone.append(identity)
        return None

    def _close(self, identity: bytes) -> None:
        bell = self._bells.pop(identity, None)
        if bell is not None:
            self._poller.unregister(bell.fd)
            del self._at[bell.fd]
            bell.close()
