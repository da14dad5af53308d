"""A member that exists only to make the coordinator answer it and publish a view."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import zmq

from moering import protocol, transport
from moering.process import incarnation
from moering.protocol import Leave, MemberInfo, Register


@contextmanager
def visiting(coordinator: str) -> Iterator[None]:
    """Register as a gateway that nobody uses; leave at the end."""
    own = MemberInfo("gateway", "visitor", incarnation(), "", os.getpid(), "ONLINE", "", 0, 0)
    with transport.make_socket(zmq.DEALER, reconnect=True) as socket:
        transport.connect(socket, coordinator)
        socket.send(protocol.encode(Register(own, "", "", 0, 0, "", b"", None)))
        yield
        socket.send(protocol.encode(Leave(own.server_id, own.incarnation)))
        socket.linger = 1000
