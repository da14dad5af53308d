"""What no honest process sends, on every zmq socket: its sender gets one clear answer, nobody else notices."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgpack
import pytest
import zmq

from moering import protocol, transport
from moering.checkpoint import Checkpoint
from moering.protocol import Hello, MemberInfo, Refused, Register
from tests.integration.cluster import DEADLINE_S, Cluster
from tests.integration.streams import Stream, Streams, bodies, check_equal

PORTS = ("coordinator", "router-0", "expert-0")
GARBAGE = {
    "bytes": [b"\xc1\xff garbage"],
    "nothing": [b""],
    "no map": [msgpack.packb([1, 2, 3])],
    "no kind": [msgpack.packb({"v": protocol.PROTOCOL_VERSION})],
    "deep": [b"\x91" * 100_000 + b"\x00"],
    "a frame too many": [protocol.encode(Hello("x", 1, "tiny", "")), b"x"],
    "a wrong type": [msgpack.packb({"v": protocol.PROTOCOL_VERSION, "kind": "hello", "server_id": 7})],
    "a kind that goes the other way": [protocol.encode(Refused("no", True))],
}


@dataclass
class Peer:
    """Somebody at the port of one process."""

    address: str

    def ask(self, frames: list[bytes]) -> list[Any]:
        """All answers to one message: a second, honest one to come after them marks their end."""
        with transport.make_socket(zmq.DEALER) as s:
            s.rcvtimeo = int(DEADLINE_S * 1000)
            transport.connect(s, self.address)
            s.send_multipart(frames)
            s.send(MARK)
            answers = []
            while True:
                message, _ = protocol.decode(s.recv_multipart())
                if isinstance(message, Refused) and MARK_TEXT in message.reason:
                    return answers
                answers.append(message)


MARK_TEXT = "the mark"
MARK = msgpack.packb({"v": protocol.PROTOCOL_VERSION, "kind": MARK_TEXT})


@pytest.fixture
def peer(cluster: Cluster, request: pytest.FixtureRequest) -> Peer:
    return Peer(cluster.process(request.param)["address"])


@pytest.fixture(scope="module")
def reference(cluster: Cluster) -> list[Stream]:
    return Streams(cluster.url, bodies(2, 60)).finish()


@contextmanager
def undisturbed(cluster: Cluster, reference: list[Stream]) -> Iterator[None]:
    """Streams run meanwhile and bring what they bring without it; nobody was restarted, or joined."""
    before = identities(cluster)
    streams = Streams(cluster.url, bodies(2, 60))
    streams.wait_tokens(5)
    yield
    check_equal(streams.finish(), reference)
    assert identities(cluster) == before


@pytest.fixture
def running_streams(cluster: Cluster, reference: list[Stream]) -> Iterator[None]:
    """They run while the test does its worst."""
    with undisturbed(cluster, reference):
        yield


def identities(cluster: Cluster) -> list[tuple[str, int, str]]:
    return [(p["id"], p["incarnation"], p["state"]) for p in cluster.status()["processes"]]


@pytest.mark.parametrize("peer", PORTS, indirect=True)
def test_garbage_gets_one_clear_answer(peer: Peer, running_streams: None) -> None:
    for name, frames in GARBAGE.items():
        answers = peer.ask(frames)
        assert len(answers) == 1 and isinstance(answers[0], Refused), (name, answers)
        assert answers[0].reason, name


@pytest.mark.parametrize("peer", PORTS, indirect=True)
def test_another_protocol_version_is_refused_with_both_named(peer: Peer, running_streams: None) -> None:
    fields = msgpack.unpackb(protocol.encode(Hello("x", 1, "tiny", "")))
    (answer,) = peer.ask([msgpack.packb(fields | {"v": 99})])
    assert isinstance(answer, Refused)
    assert "protocol version 99" in answer.reason and f"speaks {protocol.PROTOCOL_VERSION}" in answer.reason


@pytest.mark.parametrize("peer", ["router-0", "expert-0"], indirect=True)
@pytest.mark.parametrize("wrong", [{"digest": "f" * 64}, {"model": "another"}])
def test_a_hello_of_another_checkpoint_is_refused_with_both_named(
    peer: Peer, wrong: dict[str, str], checkpoint: Any, running_streams: None
) -> None:
    digest = Checkpoint(checkpoint).digest
    hello = dataclasses.replace(Hello("stranger", 1, "tiny", digest), **wrong)
    (answer,) = peer.ask([protocol.encode(hello)])
    assert isinstance(answer, Refused) and answer.fatal
    for value in ("tiny", digest[:16], hello.model, hello.digest[:16]):
        assert value in answer.reason


@pytest.mark.parametrize("peer", ["coordinator"], indirect=True)
def test_a_member_with_another_checkpoint_is_refused_with_both_named(
    peer: Peer, checkpoint: Any, running_streams: None
) -> None:
    digest = Checkpoint(checkpoint).digest
    info = MemberInfo("expert-server", "stranger", 1, "ipc:///nowhere", 1, "JOINING", "", 99, 0)
    (answer,) = peer.ask([protocol.encode(Register(info, "tiny", "f" * 64, 3, 8, "", b"", None))])
    assert isinstance(answer, Refused) and answer.fatal
    assert digest in answer.reason and "f" * 64 in answer.reason


@pytest.mark.parametrize("peer", PORTS, indirect=True)
@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n" * 10, b"\xff" * 200, b"\xff"])
def test_what_is_not_zmq_at_all_disturbs_nobody(peer: Peer, data: bytes, running_streams: None) -> None:
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(peer.address.removeprefix("ipc://"))
        s.sendall(data)
        assert len(peer.ask(GARBAGE["bytes"])) == 1  # another peer is answered while that connection is open


@pytest.mark.parametrize("peer", PORTS, indirect=True)
def test_a_frame_beyond_the_limit_costs_its_sender_the_connection(peer: Peer, running_streams: None) -> None:
    with transport.make_socket(zmq.DEALER) as s, transport.watch_disconnects(s) as watch:
        transport.connect(s, peer.address)
        s.send(b"x" * (protocol.MAX_FRAME_BYTES + 1))
        assert watch.poll(DEADLINE_S * 1000)
        s.disable_monitor()
