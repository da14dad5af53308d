"""Who has the cluster key is admitted, who has not is told so and admitted nowhere; the wire cannot be read."""

from __future__ import annotations

import errno
import socket as sockets
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import zmq

from moering import cli, protocol, transport
from moering.cluster_key import ClusterKey
from moering.coordinator import Config
from moering.errors import ConfigError
from moering.leader import Fixed, Seat
from moering.lease import LeaseClient
from moering.lease_session import LeaseSession
from moering.process import run_main
from moering.protocol import Lease, Leave, Registered
from moering.refusals import say_seldom
from tests.faults.relay import Relay
from tests.integration.cluster import wait_for
from tests.keys import new_key, using
from tests.moering.cluster import Member
from tests.moering.stubs import DEADLINE_S
from tests.moering.test_coordinator import coordinator
from tests.ports import free_port

HINT = "has it another cluster key?"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.key"
    ClusterKey.create(str(path))
    return path


# --- the file --------------------------------------------------------------------------------------------------------


def test_keygen_writes_what_only_the_owner_reads_and_shows_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cluster.key"
    assert cli.main(["keygen", str(path)]) == 0
    key, shown = ClusterKey.read(str(path)), capsys.readouterr()
    assert path.stat().st_mode & 0o777 == 0o600
    assert key.public == zmq.curve_public(key.secret)
    assert f"--key {path}" in shown.out and key.secret.decode() not in shown.out + shown.err + repr(key)


def test_keygen_overwrites_nothing(key_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = key_file.read_bytes()
    assert cli.main(["keygen", str(key_file)]) == 2
    assert "is there already" in capsys.readouterr().err and key_file.read_bytes() == before


@pytest.mark.parametrize("argv", [[], ["/nowhere/cluster.key"]])
def test_keygen_says_what_it_cannot_do(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["keygen", *argv]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_key_that_others_can_reach_is_refused(key_file: Path, mode: int, capsys: pytest.CaptureFixture[str]) -> None:
    key_file.chmod(mode)
    assert run_main("coordinator", Config, lambda config: 0, ["--key", str(key_file)]) == 2
    assert f"mode {mode:03o}" in capsys.readouterr().err
    assert not transport.has_key()


@pytest.mark.parametrize("content", [b"", b"no key\n", b"x" * 39, b"x" * 41, b"~" * 40, b"\xff" * 40, b"x" * 5000])
def test_a_file_that_holds_no_key_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.key"
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="holds no cluster key"):
        ClusterKey.read(str(path))


@pytest.mark.parametrize("name", ["", "missing.key"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot read the cluster key"):
        ClusterKey.read(str(tmp_path / name))


# --- addresses -------------------------------------------------------------------------------------------------------


def test_with_a_key_an_address_that_others_reach_is_bound() -> None:
    with using(new_key()), transport.make_socket(zmq.ROUTER) as socket:
        assert transport.bind(socket, "tcp://0.0.0.0:*").startswith("tcp://0.0.0.0:")
    with transport.make_socket(zmq.ROUTER) as socket, pytest.raises(ConfigError, match="moering keygen"):
        transport.bind(socket, "tcp://0.0.0.0:*")


# --- who is admitted -------------------------------------------------------------------------------------------------


@contextmanager
def listening(key: ClusterKey | None) -> Iterator[tuple[Any, str]]:
    with using(key), transport.make_socket(zmq.ROUTER) as socket:
        yield socket, transport.bind(socket, "tcp://127.0.0.1:*")


def knock(address: str, key: ClusterKey | None, identity: ClusterKey | None = None) -> int:
    """The event that ends an attempt to connect. `identity`: what is shown as the own pair instead of the key."""
    with using(key), transport.make_socket(zmq.DEALER) as socket:
        if identity is not None:
            socket.curve_publickey, socket.curve_secretkey = identity.public, identity.secret
        with transport.watch_handshakes(socket) as watch:
            transport.connect(socket, address)
            transport.try_send(socket, [b"not for strangers"])
            assert watch.poll(DEADLINE_S * 1000)
            event = transport.read_event(watch)
            socket.disable_monitor()
    assert event is not None
    return event.kind


def test_a_socket_is_watched_although_its_descriptor_was_another_watched_ones() -> None:
    with transport.make_socket(zmq.DEALER) as socket, zmq.Context.instance().socket(zmq.PAIR) as earlier:
        earlier.bind(f"inproc://monitor.s-{socket.fd}")  # where pyzmq would have libzmq report, and has not let go of
        with transport.watch_disconnects(socket) as watch:
            transport.connect(socket, "tcp://127.0.0.1:1")
            assert watch.poll(DEADLINE_S * 1000)
            socket.disable_monitor()


OWN, OTHER = new_key(), new_key()


@pytest.mark.parametrize(
    ("key", "identity", "said"),
    [
        (OTHER, None, "the other process has another cluster key"),
        (None, None, "the other process has no cluster key, this one has"),
        (OWN, OTHER, "the connecting process has another cluster key"),
    ],
    ids=["another key", "no key", "the public half"],
)
def test_a_stranger_is_admitted_nowhere_and_the_listening_side_says_why(
    key: ClusterKey | None, identity: ClusterKey | None, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with listening(OWN) as (socket, address):
        knock(address, key, identity)
        wait_for("a line of the listening side", lambda: f"no connection at {address}: {said} (--key)" in caplog.text)
        with using(OWN), transport.make_socket(zmq.DEALER) as member:
            transport.connect(member, address)
            member.send(b"of a member")
            assert socket.recv_multipart()[1] == b"of a member"  # and nothing came before it


def test_a_keyed_process_speaks_to_no_other_one(caplog: pytest.LogCaptureFixture) -> None:
    with listening(None) as (socket, address):
        assert knock(address, new_key()) == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        assert f"no connection at {address}: the other process has no cluster key" in caplog.text
        assert not socket.poll(0)


@pytest.mark.parametrize("keyed", [False, True])
def test_a_frame_at_the_limit_passes_and_one_beyond_it_does_not(keyed: bool) -> None:
    key = new_key() if keyed else None
    with listening(key) as (socket, address), using(key), transport.make_socket(zmq.DEALER) as member:
        socket.rcvtimeo = int(DEADLINE_S * 1000)
        with transport.watch_disconnects(member) as watch:
            transport.connect(member, address)
            member.send(bytes(protocol.MAX_FRAME_BYTES))
            assert len(socket.recv_multipart()[1]) == protocol.MAX_FRAME_BYTES
            member.send(bytes(protocol.MAX_FRAME_BYTES + 1))
            assert watch.poll(DEADLINE_S * 1000)
            member.disable_monitor()


def test_clusters_of_different_keys_in_one_process_keep_apart() -> None:
    one, two = new_key(), new_key()
    with listening(one) as (first, at_first), listening(two) as (second, at_second):
        for key, socket, address, elsewhere in ((one, first, at_first, at_second), (two, second, at_second, at_first)):
            knock(elsewhere, key)
            with using(key), transport.make_socket(zmq.DEALER) as member:
                transport.connect(member, address)
                member.send(b"x")
                assert socket.recv_multipart()[1] == b"x"


def test_where_nobody_keeps_the_door_nobody_enters(monkeypatch: pytest.MonkeyPatch) -> None:
    key = new_key()
    with zmq.Context() as context:
        monkeypatch.setattr("moering.cluster_key._start_doorkeeper", lambda context: None)
        with context.socket(zmq.ROUTER) as socket:
            socket.linger = 0
            key.protect(socket, listening=True)
            socket.bind("tcp://127.0.0.1:*")
            knock(socket.last_endpoint.decode(), key)
            assert not socket.poll(0)


def test_threads_of_a_closed_socket_end() -> None:
    with listening(new_key()):
        assert "refusals" in threads()
    wait_for("the thread's end", lambda: "refusals" not in threads())


def threads() -> set[str]:
    return {t.name for t in threading.enumerate()}


def test_who_tries_again_and_again_is_named_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now_s = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    for _ in range(3):
        say_seldom("somebody of this test")
    assert len(caplog.records) == 1
    now_s[0] += 61
    say_seldom("somebody of this test")
    assert len(caplog.records) == 2


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


# --- the wire --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keyed", [False, True])
def test_what_is_sent_is_on_the_wire_only_without_a_key(keyed: bool, key_file: Path) -> None:
    name, wire = "a-member-with-a-long-name", bytearray()
    member = Member("router", name)
    with coordinator("tcp://127.0.0.1:*", *(["--key", str(key_file)] if keyed else [])) as (_, address):
        relay, key = Relay(partial(port_of, address), wire.extend), ClusterKey.read(str(key_file)) if keyed else None
        with closing(relay), using(key), transport.make_socket(zmq.DEALER) as socket:
            socket.rcvtimeo = int(DEADLINE_S * 1000)
            transport.connect(socket, f"tcp://127.0.0.1:{relay.port}")
            socket.send(protocol.encode(member.register()))
            answer, _ = protocol.decode(socket.recv_multipart())
            assert isinstance(answer, Registered)
    words = (name.encode(), b"router", b"registered", b"incarnation")
    assert [word in wire for word in words] == [not keyed] * len(words)
    assert (b"CURVE" if keyed else b"NULL") in wire


# --- a member and its coordinator ------------------------------------------------------------------------------------


@contextmanager
def member_of(address: str) -> Iterator[threading.Event]:
    """A member in this process; the event is set once the coordinator has registered it."""
    member, registered = Member("gateway", "g0"), threading.Event()

    def lease() -> Lease:
        registered.set()
        return member.lease()

    session = LeaseSession(member.register, lease, lambda view: None, lambda reason: None)
    client = LeaseClient(Fixed(Seat(address)), session)
    client.start()
    try:
        yield registered
    finally:
        client.close(Leave(member.server_id, member.incarnation))


@pytest.mark.parametrize("what", ["make_socket", "watch_handshakes"])
def test_a_member_that_cannot_connect_for_want_of_files_tries_again(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, want = getattr(transport, what), [zmq.ZMQError(errno.EMFILE)]

    def short(*args: object, **options: object) -> object:
        if want:
            raise want.pop()
        return make(*args, **options)

    monkeypatch.setattr(transport, what, short)
    with coordinator("tcp://127.0.0.1:*") as (_, address), member_of(address) as registered:
        assert registered.wait(DEADLINE_S) and not want


@pytest.mark.parametrize(("coordinators", "said"), [("another", HINT), ("none", "has no cluster key")])
def test_a_member_says_that_the_keys_differ_and_joins_once_they_do_not(
    coordinators: str, said: str, key_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ClusterKey.create(str(tmp_path / "another.key"))
    flags = ["--key", str(tmp_path / "another.key")] if coordinators == "another" else []
    address = f"tcp://127.0.0.1:{free_port()}"
    with using(ClusterKey.read(str(key_file))), ExitStack() as stack:
        with coordinator(address, *flags):
            registered = stack.enter_context(member_of(address))
            wait_for("a line in the log", lambda: any(said in m and address in m for m in caplog.messages))
            assert not registered.is_set()
        with coordinator(address, "--key", str(key_file)):
            assert registered.wait(DEADLINE_S)


def test_a_coordinator_that_stands_still_is_not_taken_for_one_of_another_key(caplog: pytest.LogCaptureFixture) -> None:
    with using(new_key()), sockets.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(DEADLINE_S)
        with member_of(f"tcp://127.0.0.1:{server.getsockname()[1]}"):
            connections = [server.accept()[0] for _ in range(2)]  # the second one, as the first has led to nothing
            assert HINT not in caplog.text
            for connection in connections:
                connection.close()
            wait_for("the line that is said of an end", lambda: HINT in caplog.text)
