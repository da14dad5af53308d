"""Where a running cluster keeps its experts: asked of the coordinator as a member would."""

from __future__ import annotations

import numpy as np
import zmq

from moering import protocol, transport
from moering.process import incarnation
from moering.protocol import Leave, MemberInfo, Register, View
from tests.integration.cluster import DEADLINE_S, Cluster


def holders(cluster: Cluster) -> list[set[str]]:
    """The servers that each expert is routed to, layer by layer."""
    view = _view(str(cluster.process("coordinator")["address"]))
    routing = np.frombuffer(view.routing, "<i2").reshape(-1, view.width)
    return [{view.servers[s] for s in row if s >= 0} for row in routing.tolist()]


def _view(coordinator: str) -> View:
    own = MemberInfo("gateway", "a-test", incarnation(), "", 0, "ONLINE", "", 0, 0)
    with transport.make_socket(zmq.DEALER) as socket:
        socket.rcvtimeo = int(DEADLINE_S * 1000)
        transport.connect(socket, coordinator)
        socket.send(protocol.encode(Register(own, "", "", 0, 0, "", b"", None)))
        while not isinstance(message := protocol.decode(socket.recv_multipart())[0], View):
            pass
        socket.send(protocol.encode(Leave(own.server_id, own.incarnation)))
        socket.close(1000)
    return message
