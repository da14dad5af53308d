"""One connection to one incarnation of an expert server: a socket, and a watch on its loss."""

from __future__ import annotations

from typing import Any

import zmq

from moering import protocol, transport
from moering.protocol import Hello, MemberInfo


class Connection:
    """Never reused: a server that comes back, even at the same address, gets a new connection."""

    def __init__(self, server: MemberInfo, hello: Hello) -> None:
        """Connect and say hello. Raises `OSError` when the address does not resolve."""
        self.server_id, self.incarnation = server.server_id, server.incarnation
        self.key = server.server_id, server.incarnation
        self.welcomed, self.open = False, True
        self.socket = transport.make_socket(zmq.DEALER, transport.DATA, queue_messages=10_000)
        self.watch = transport.watch_disconnects(self.socket)
        try:
            transport.connect(self.socket, server.address)
        except OSError:
            self.close()
            raise
        transport.try_send(self.socket, [protocol.encode(hello)])

    def register(self, poller: zmq.Poller) -> None:
        """Poll for messages and for the loss of the connection."""
        poller.register(self.socket, zmq.POLLIN)
        poller.register(self.watch, zmq.POLLIN)

    def unregister(self, poller: zmq.Poller) -> None:
        """The reverse of `register`."""
        poller.unregister(self.socket)
        poller.unregister(self.watch)

    def lost(self) -> bool:
        """Whether the watch has anything to say: all that it watches for means that this connection is over."""
        return transport.try_receive(self.watch) is not None

    def receive(self) -> list[bytes] | None:
        """The next message, if one is waiting."""
        return transport.try_receive(self.socket)

    def send(self, message: Any, tensor: memoryview) -> bool:
        """Send without blocking."""
        return transport.try_send(self.socket, [protocol.encode(message), tensor])

    def close(self) -> None:
        """Close at once; nothing that is queued goes out."""
        self.open = False
        self.socket.disable_monitor()
        self.watch.close()
        self.socket.close()
