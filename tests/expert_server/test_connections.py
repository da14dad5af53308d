"""Connections are counted as they come and go, over real sockets."""

import time

import pytest
import zmq

from expert_server.connections import Connections
from moering import transport
from tests.integration.cluster import wait_for
from tests.keys import new_key, using


@pytest.fixture(params=["ipc", "tcp"])
def listening(request, tmp_path):
    """The connections of a socket, and its address."""
    socket = transport.make_socket(zmq.ROUTER)
    endpoint = f"ipc://{tmp_path}/listening" if request.param == "ipc" else "tcp://127.0.0.1:*"
    address = transport.bind(socket, endpoint)
    connections = Connections(socket)
    connections.start()
    yield connections, address
    socket.close()
    connections.join(10)
    assert not connections.is_alive()


@pytest.fixture
def connect():
    made = []

    def one(address):
        made.append(transport.make_socket(zmq.DEALER))
        transport.connect(made[-1], address)
        return made[-1]

    yield one
    for socket in made:
        socket.close()


def wait_open(connections, count):
    wait_for(f"{count} are connected", lambda: len(connections.open) == count)


def test_nobody_is_connected_at_first(listening):
    connections, _ = listening
    first = connections.gone_for_s
    assert first > 0
    wait_for("that counts on", lambda: connections.gone_for_s > first)


def test_the_time_alone_counts_from_the_end_of_the_last(listening, connect):
    connections, address = listening
    begun_s = time.monotonic()
    first, second = connect(address), connect(address)
    wait_open(connections, 2)
    first.close()
    wait_open(connections, 1)
    assert connections.gone_for_s == 0
    closed_s = time.monotonic()
    second.close()
    wait_open(connections, 0)
    assert 0 < connections.gone_for_s <= time.monotonic() - closed_s < time.monotonic() - begun_s
    connect(address)
    wait_open(connections, 1)
    assert connections.gone_for_s == 0


def test_a_stranger_without_the_key_is_not_connected_for_long(tmp_path, connect, caplog):
    with using(new_key()):
        socket = transport.make_socket(zmq.ROUTER)
        address = transport.bind(socket, f"ipc://{tmp_path}/listening")
        connections = Connections(socket)
        connections.start()
        connect(address)
        wait_open(connections, 1)
        with zmq.Context.instance().socket(zmq.DEALER) as stranger:
            stranger.reconnect_ivl = -1
            stranger.connect(address)
            wait_for("it is refused", lambda: "the other process has no cluster key" in caplog.text)
            wait_open(connections, 1)
        socket.close()
        connections.join(10)
    assert not connections.is_alive()
