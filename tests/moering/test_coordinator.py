"""The coordinator as a real process, with members that are DEALER sockets in this test."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf, nan

import pytest
import zmq

from moering import protocol, transport
from moering.coordinator import Config, Coordinator
from moering.errors import ConfigError
from moering.membership import Membership
from moering.probe import EndpointProbe
from moering.protocol import ProvenExit, Refused, View
from tests.moering.cluster import Member, of, table
from tests.moering.stubs import DEADLINE_S
from tests.ports import free_port


@contextmanager
def coordinator(bind: str, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "moering.coordinator", "--bind", bind, *flags], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on "), line
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


class Members:
    """Honest members, each with a socket; `until` lets them talk until something is true."""

    def __init__(self, address: str, *members: Member) -> None:
        self.address = address
        self.sockets: dict[str, zmq.Socket[bytes]] = {}
        self.members: dict[str, Member] = {}
        self.poller = zmq.Poller()
        self.seen_offline: set[str] = set()
        for member in members:
            self.add(member)

    def add(self, member: Member) -> None:
        s = transport.make_socket(zmq.DEALER, reconnect=True)
        transport.connect(s, self.address)
        self.poller.register(s, zmq.POLLIN)
        self.sockets[member.server_id], self.members[member.server_id] = s, member

    def remove(self, server_id: str) -> Member:
        s = self.sockets.pop(server_id)
        self.poller.unregister(s)
        s.close()
        return self.members.pop(server_id)

    def send(self, server_id: str, message: object) -> None:
        transport.try_send(self.sockets[server_id], [protocol.encode(message)])

    def until(self, done: Callable[[], bool], seconds: float = DEADLINE_S) -> None:
        deadline, renew_s = time.monotonic() + seconds, 0.0
        while not done():
            assert time.monotonic() < deadline, {m.server_id: (m.registered, m.refused) for m in self.members.values()}
            if time.monotonic() >= renew_s:
                renew_s = time.monotonic() + 0.3
                for server_id, member in self.members.items():
                    self.send(server_id, member.lease() if member.registered else member.register())
                    member.registered = True
            self.poller.poll(50)
            for server_id, member in list(self.members.items()):
                while (frames := transport.try_receive(self.sockets[server_id])) is not None:
                    message, _ = protocol.decode(frames)
                    if isinstance(message, View):
                        self.seen_offline |= {m.server_id for m in message.members if m.state == "OFFLINE"}
                    for reply in member.take(message):
                        self.send(server_id, reply)

    def views(self, *server_ids: str) -> list[View | None]:
        return [self.members[i].view for i in server_ids or self.members]

    def all_see(self, condition: Callable[[View], bool]) -> Callable[[], bool]:
        return lambda: all(v is not None and condition(v) for v in self.views())

    def close(self) -> None:
        for server_id in list(self.members):
            self.remove(server_id)


def some_servers(count: int = 3) -> list[Member]:
    return [Member("expert-server", f"e{i}", state="JOINING") for i in range(count)]


def test_a_cluster_comes_up_survives_its_coordinator_and_then_loses_a_server() -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    flags = ("--expert-servers", "3", "--lease-s", "5", "--rejoin-grace-s", "0.5")
    members = Members(address, *some_servers(), Member("router", "r0"), Member("gateway", "g0"))
    try:
        with coordinator(address, *flags) as (process, _):
            members.until(members.all_see(lambda v: v.failures_survivable == 1 and len(v.members) == 6))
            process.send_signal(signal.SIGKILL)
            process.wait()
        before = members.members["r0"].view
        assert before is not None
        killed = members.remove("e2")
        with coordinator(address, *flags):
            members.send("g0", ProvenExit("e2", killed.pid, -9))
            members.until(members.all_see(lambda v: v.term == before.term + 1))
            after = members.members["r0"].view
            assert after is not None and after.epoch > before.epoch
            for server_id in ("e0", "e1"):  # nobody is asked to drop or to stop serving what it held
                assert of(before, "routing", server_id) <= of(after, "routing", server_id)
            members.until(members.all_see(lambda v: v.failures_survivable == 1))
            view = members.members["g0"].view
            assert view is not None
            assert all(set(row) == {"e0", "e1"} for layer in table(view, "routing") for row in layer)
            assert {m.server_id: m.state for m in view.members}["e2"] == "OFFLINE"
    finally:
        members.close()


def test_bad_frames_cost_only_their_sender_an_error() -> None:
    with coordinator("tcp://127.0.0.1:*", "--expert-servers", "2") as (process, address):
        members = Members(address, *some_servers(2))
        stranger = transport.make_socket(zmq.DEALER)
        try:
            transport.connect(stranger, address)
            members.until(members.all_see(lambda v: v.failures_survivable == 1))
            wrong_state = members.members["e0"].lease()
            object.__setattr__(wrong_state, "state", "SLEEPING")
            for frames in (
                [b"\xff\x00garbage"],
                [b""],
                [protocol.encode(wrong_state)],
                [protocol.encode(protocol.Abort("x", 1))],
                [protocol.encode(members.members["e0"].register()), b"a second frame"],
            ):
                stranger.send_multipart(frames)
                assert stranger.poll(DEADLINE_S * 1000), frames
                answer, _ = protocol.decode(stranger.recv_multipart())
                assert isinstance(answer, Refused) and not answer.fatal
            stranger.send(b"")  # and again after it: the members go on
            late = Member("router", "r9")
            members.add(late)
            members.until(lambda: late.view is not None and late.view.failures_survivable == 1)
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE_S) == 0
        finally:
            stranger.close()
            members.close()


def test_an_address_that_others_reach_is_refused_without_insecure() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "moering.coordinator", "--bind", "tcp://0.0.0.0:*"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "--insecure" in result.stderr
    c = Coordinator(Config(bind="tcp://0.0.0.0:*", insecure=True))
    c.close()


def test_it_binds_where_a_killed_one_was_bound_over_ipc(tmp_path: object) -> None:
    address = f"ipc://{tmp_path}/c"
    with coordinator(address):
        pass  # killed: its socket file stays
    with coordinator(address) as (process, bound):
        assert bound == address
        process.terminate()
        assert process.wait(DEADLINE_S) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"replication": 0}, {"expert_servers": -1}, {"lease_s": 0.5}, {"lease_s": nan}, {"lease_s": inf},
        {"settle_s": -1.0}, {"rejoin_grace_s": nan}, {"rebalance_s": -1.0}, {"election_ttl_s": 1},
    ],
)  # fmt: skip
def test_settings_without_meaning_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Config(**wrong)  # type: ignore[arg-type]


def test_a_signal_that_comes_while_it_looks_whether_an_operation_ends_it_ends_it(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator, looks = Coordinator(Config(bind=f"ipc://{tmp_path}/c")), []

    def look(membership: Membership) -> bool:
        looks.append(membership)
        coordinator.stop()  # as a signal's handler does, between two byte codes
        return len(looks) > 1

    monkeypatch.setattr(Membership, "told_to_leave", property(look))
    coordinator.run()
    assert len(looks) == 1


def ask(address: str) -> str:
    probe = EndpointProbe(address, time.monotonic())
    try:
        while (answer := probe.answer(time.monotonic())) is None:
            zmq.select([probe.fd], [], [], 0.05)
        return answer
    finally:
        probe.close()


@pytest.mark.parametrize("scheme", ["tcp", "ipc"])
def test_a_probe_tells_a_serving_a_stopped_and_a_dead_process_apart(scheme: str, tmp_path: object) -> None:
    bind = f"tcp://127.0.0.1:{free_port()}" if scheme == "tcp" else f"ipc://{tmp_path}/c"
    with coordinator(bind) as (process, address):
        assert ask(address) == "answered"
        os.kill(process.pid, signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)  # until all its threads have stopped
        assert ask(address) == "silent"
    assert ask(address) == "refused"


def test_the_shell_evicts_a_suspect_only_after_its_own_probe() -> None:
    stopped = socket.socket()
    stopped.bind(("127.0.0.1", 0))
    stopped.listen()  # accepts, as the kernel does for a stopped process, and never greets
    with stopped, coordinator("tcp://127.0.0.1:*", "--expert-servers", "3") as (_, address):
        members = Members(address, *some_servers(), Member("router", "r0"))
        members.members["e0"].address = address  # somebody answers there
        members.members["e1"].address = f"tcp://127.0.0.1:{stopped.getsockname()[1]}"
        members.members["e2"].address = "ipc:///nowhere/at/all"
        try:
            members.until(members.all_see(lambda v: v.failures_survivable == 1))
            members.members["r0"].suspects = ["e0", "e1", "e2"]
            members.until(lambda: {"e1", "e2"} <= members.seen_offline)
            assert members.seen_offline == {"e1", "e2"}
        finally:
            members.close()
