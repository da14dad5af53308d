"""A cluster with a key serves as one without, and at none of its ports does a stranger get past the handshake."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import zmq

from moering import protocol, transport
from moering.cluster_key import ClusterKey
from moering.protocol import Hello
from tests.integration.cluster import DEADLINE_S, REPO, Cluster, serving, wait_for
from tests.integration.streams import Stream, Streams, bodies, check_equal
from tests.integration.test_bad_frames import GARBAGE, PORTS, Peer, undisturbed
from tests.keys import new_key, using

FLAGS = ("--max-restart-delay-s", "0")


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("key") / "cluster.key")
    ClusterKey.create(path)
    return path


@pytest.fixture(scope="module")
def keyed(checkpoint: Path, key_file: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with serving(checkpoint, tmp_path_factory.mktemp("keyed"), ("--key", key_file, *FLAGS)) as made:
        yield made


@pytest.fixture(scope="module")
def reference(cluster: Cluster) -> list[Stream]:
    """Of a cluster without a key."""
    return Streams(cluster.url, bodies(2, 60)).finish()


def test_a_killed_expert_server_changes_no_token(keyed: Cluster, reference: list[Stream]) -> None:
    streams = Streams(keyed.url, bodies(2, 60))
    streams.wait_tokens(5)
    victims = keyed.kill("expert-1")
    check_equal(streams.finish(), reference)
    keyed.wait_replaced(victims)


def test_rows_of_one_machine_go_through_shared_memory_as_without_a_key(keyed: Cluster) -> None:
    pid = keyed.process("expert-0")["pid"]
    assert "moering-rows" in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.parametrize(
    ("key", "said"),
    [(new_key(), "has another cluster key"), (None, "has no cluster key, this one has")],
    ids=["another key", "no key"],
)
def test_strangers_are_admitted_at_no_port(
    keyed: Cluster, reference: list[Stream], key: ClusterKey | None, said: str
) -> None:
    with undisturbed(keyed, reference), using(key):
        for server_id in PORTS:
            address = keyed.process(server_id)["address"]
            line = f"no connection at {address}: the other process {said}"
            # Both ends see that the other is a stranger, and who sees it first hangs up: the other one cannot tell why.
            wait_for("its line in the log", partial(knock_until, address, partial(keyed.logged, line)))


def knock_until(address: str, condition: Callable[[], bool]) -> bool:
    """Ask to be let in, and see that nobody answers; whether the condition holds then."""
    with transport.make_socket(zmq.DEALER) as s, transport.watch_handshakes(s) as watch:
        transport.connect(s, address)
        transport.try_send(s, [protocol.encode(Hello("stranger", 1, "", ""))])
        assert watch.poll(DEADLINE_S * 1000), address
        assert not s.poll(0), "it was answered"
        s.disable_monitor()
    return condition()


@pytest.mark.parametrize("stranger", ["another key", "no key"])
def test_a_process_of_another_key_says_what_keeps_it_out(
    keyed: Cluster, reference: list[Stream], stranger: str, tmp_path: Path
) -> None:
    ClusterKey.create(str(tmp_path / "another.key"))
    flags = ["--key", str(tmp_path / "another.key")] if stranger == "another key" else []
    join = keyed.process("coordinator")["address"]
    argv = ["--checkpoint", str(keyed.checkpoint), "--join", join, "--id", "stranger", "--port", "0", *flags]
    log = tmp_path / "log"
    with undisturbed(keyed, reference), log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-m", "gateway", *argv], cwd=REPO, stderr=out)
        try:
            wait_for("its line in the log", lambda: f"{join}" in log.read_text() and "(--key)" in log.read_text())
            assert process.poll() is None  # it goes on trying
        finally:
            process.kill()
            process.wait()


def test_garbage_of_members_and_of_others_disturbs_nobody(
    keyed: Cluster, reference: list[Stream], key_file: str
) -> None:
    with undisturbed(keyed, reference), using(ClusterKey.read(key_file)):
        for server_id in PORTS:
            peer = Peer(keyed.process(server_id)["address"])
            for data in (b"GET / HTTP/1.1\r\n\r\n" * 10, b"\xff" * 200, b"\xff"):
                with socket.socket(socket.AF_UNIX) as s:
                    s.connect(peer.address.removeprefix("ipc://"))
                    s.sendall(data)
                    assert len(peer.ask(GARBAGE["bytes"])) == 1
            for name, frames in GARBAGE.items():
                assert len(peer.ask(frames)) == 1, name
            with transport.make_socket(zmq.DEALER) as oversized, transport.watch_disconnects(oversized) as watch:
                transport.connect(oversized, peer.address)
                oversized.send(b"x" * (protocol.MAX_FRAME_BYTES + 1))
                assert watch.poll(DEADLINE_S * 1000)
                oversized.disable_monitor()
