from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from math import nan
from pathlib import Path
from typing import Any

import pytest
import zmq

from moering import launcher, protocol, transport
from moering.commands import Commands
from moering.errors import ConfigError
from moering.launcher import STOP_ORDER, Config
from moering.process import command_line
from tests.integration.cluster import REPO
from tests.moering.stubs import DEADLINE_S, Mailbox
from tests.ports import free_port

IDS = [f"{kind}-0" for kind in STOP_ORDER]


class Launched:
    """The launcher as a process of its own, over stub processes, with the test as their coordinator's socket."""

    def __init__(self, mailbox: Mailbox, *behaviour: str) -> None:
        self.mailbox = mailbox
        self.port = free_port()
        self.coordinator = transport.make_socket(zmq.ROUTER)
        address = transport.bind(self.coordinator, f"ipc://{mailbox.directory}/coordinator")
        module = [sys.executable, "-m", "tests.moering.stub_launcher"]
        self.process = subprocess.Popen(
            [*module, str(mailbox.directory), str(self.port), address, *(behaviour or ["serve"])],
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pids = {server_id: pid for server_id, (_, pid) in mailbox.started(len(STOP_ORDER)).items()}

    def line(self) -> str:
        """The next line of the launcher's standard output."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def exit(self) -> protocol.ProvenExit:
        """The next one that the coordinator hears of."""
        received: object = None
        while not isinstance(received, protocol.ProvenExit):  # the launcher itself wants to be a member
            assert self.coordinator.poll(DEADLINE_S * 1000)
            _, *frames = self.coordinator.recv_multipart()
            received, _ = protocol.decode(frames)
        return received

    def close(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE_S)
        if not self.mailbox.all_dead(within_s=DEADLINE_S):  # a test fails; that is no reason to leave them behind
            for pid in self.pids.values():
                os.kill(pid, signal.SIGKILL)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.coordinator.close(0)


@pytest.fixture
def launched(mailbox: Mailbox) -> Iterator[Launched]:
    launched = Launched(mailbox)
    yield launched
    launched.close()


def test_says_in_one_line_when_requests_are_accepted(launched: Launched) -> None:
    assert launched.line() == (
        f"Ready: http://127.0.0.1:{launched.port}/v1 serves stub; "
        "0 expert replicas on 0 expert servers; NO failure of an expert server is survived now; "
        "further replicas of 5 experts are being loaded\n"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_the_processes_in_order(launched: Launched, mailbox: Mailbox, number: int) -> None:
    launched.process.send_signal(number)
    assert launched.process.wait(DEADLINE_S) == 0
    assert mailbox.rest() == [(i, event) for i in IDS for event in ("told to stop", "ends")]


def test_under_nohup_the_end_of_the_terminal_stops_nothing(mailbox: Mailbox) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        launched = Launched(mailbox)
    finally:
        signal.signal(signal.SIGHUP, before)
    try:
        assert launched.line().startswith("Ready:")
        launched.process.send_signal(signal.SIGHUP)
        os.kill(launched.pids["expert-server-0"], signal.SIGKILL)
        assert mailbox.started()["expert-server-0"][0] == 1  # it goes on
    finally:
        launched.close()


@pytest.mark.parametrize("behaviour", [["serve"], ["serve", "preload"]])
def test_a_parent_that_wanted_to_know_of_no_ends_hides_none(
    mailbox: Mailbox, behaviour: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        launched = Launched(mailbox, *behaviour)
    finally:
        signal.signal(signal.SIGCHLD, before)
    try:
        os.kill(launched.pids["expert-server-0"], signal.SIGKILL)
        assert launched.exit().exit_code == -signal.SIGKILL
        assert mailbox.started()["expert-server-0"][0] == 1
    finally:
        launched.close()


def test_a_proven_exit_goes_to_the_coordinator(launched: Launched, mailbox: Mailbox) -> None:
    pid = launched.pids["expert-server-0"]
    os.kill(pid, signal.SIGKILL)
    assert launched.exit() == protocol.ProvenExit("expert-server-0", pid, -signal.SIGKILL)
    assert mailbox.started()["expert-server-0"][0] == 1


# A process that is inside native code and keeps the interpreter lock cannot act on anything itself: Linux ends it.
@pytest.mark.parametrize("behaviour", ["serve", "wedged", "wedged preload"] if sys.platform == "linux" else ["serve"])
def test_a_killed_launcher_leaves_no_process(mailbox: Mailbox, behaviour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    launched = Launched(mailbox, *behaviour.split())
    try:
        launched.process.kill()
        assert mailbox.all_dead(within_s=DEADLINE_S)
        assert mailbox.rest() == []
    finally:
        launched.close()


def argv(config: Config, server_id: str, start: int = 0) -> list[str]:
    command = next(c for c in Commands(config, Path("/models/m"), Path("/run/r")).initial() if c.id == server_id)
    return list(command.argv(start))[len(command_line("gateway")) - 1 :]  # from the module on


def test_each_process_gets_its_flags() -> None:
    config = Config(port=8123, router_args="--max-num-seqs 4", gateway_args="--queue=7")
    ids = [c.id for c in Commands(config, Path("/models/m"), Path("/run/r")).initial()]
    assert ids == ["coordinator", "expert-0", "expert-1", "expert-2", "router-0", "gateway-0"]
    join = ["--checkpoint", "/models/m", "--join", "ipc:///run/r/coordinator"]
    size = ["--expert-servers", "3", "--replication", "2", "--rejoin-grace-s", "5.0"]
    assert argv(config, "coordinator") == ["moering.coordinator", "--bind", "ipc:///run/r/coordinator", *size]
    bind = ["--id", "expert-1", "--bind", "ipc:///run/r/expert-1.0"]
    assert argv(config, "expert-1") == ["expert_server", *join, *bind]
    bind = ["--id", "router-0", "--bind", "ipc:///run/r/router-0.0"]
    assert argv(config, "router-0") == ["router", *join, *bind, "--max-num-seqs", "4"]
    pair = dataclasses.replace(config, routers=2)
    beside = ["--nice", "--catch-up-lock", "/run/r/catch-up"]
    assert argv(pair, "router-0") == ["router", *join, *bind, *beside, "--max-num-seqs", "4"]
    http = ["--host", "127.0.0.1", "--port", "8123", "--served-model-name", "default"]
    assert argv(config, "gateway-0") == ["gateway", *join, "--id", "gateway-0", *http, "--queue=7"]


@pytest.mark.parametrize(("flags", "forked"), [({}, True), ({"preload": False}, False), ({"device": "cuda"}, True)])
def test_who_computes_on_cpus_is_forked_from_a_process_with_pytorch(flags: dict[str, Any], forked: bool) -> None:
    commands = Commands(Config(**flags), Path("/models/m"), Path("/run/r")).initial()
    expected = {"router", "expert-server"} if forked and sys.platform == "linux" else set()
    assert {c.kind for c in commands if c.preload} == expected


def test_expert_servers_are_put_into_the_zones_in_turn() -> None:
    config = Config(expert_servers=3, zones=("a", "b"))
    assert [argv(config, f"expert-{i}")[-2:] for i in range(3)] == [["--zone", z] for z in "aba"]


@pytest.mark.parametrize(
    ("gpus", "routers", "expected"),
    [
        ("0,1,2", 1, {"router-0": "0", "expert-0": "1", "expert-1": "2", "expert-2": "1"}),
        ("4,5,6", 2, {"router-0": "4", "router-1": "5", "expert-0": "6", "expert-1": "6", "expert-2": "6"}),
        ("0", 1, {"router-0": "0", "expert-0": "0", "expert-1": "0", "expert-2": "0"}),
        ("", 1, {}),
    ],
)
def test_routers_get_the_first_gpus_and_expert_servers_the_rest(
    gpus: str, routers: int, expected: dict[str, str]
) -> None:
    config = Config(device="cuda", gpus=tuple(filter(None, gpus.split(","))), routers=routers, expert_servers=3)
    commands = Commands(config, Path("/models/m"), Path("/run/r"))
    assert {c.id: c.env["CUDA_VISIBLE_DEVICES"] for c in commands.initial() if c.env} == expected
    joined = commands.make("expert-4", "expert-server")  # as scaling makes them
    assert joined is not None and bool(joined.env) == bool(gpus)


def test_gpus_without_cuda_are_refused() -> None:
    with pytest.raises(ConfigError, match="--device cuda"):
        Config(gpus=("0",))


def test_where_coordinators_are_elected_each_machine_has_one_and_ids_of_its_own() -> None:
    config = Config(membership="etcd://h:1", machine="m", listen="10.0.0.5", insecure=True, expert_servers=1)
    ids = [c.id for c in Commands(config, Path("/models/m"), Path("/run/r")).initial()]
    assert ids == ["m-coordinator", "m-expert-0", "m-router-0", "m-gateway-0"]
    bind, elect = ["--bind", "tcp://10.0.0.5:*", "--insecure"], ["--membership", "etcd://h:1"]
    size = ["--expert-servers", "1", "--replication", "2", "--rejoin-grace-s", "5.0"]
    assert argv(config, "m-coordinator") == ["moering.coordinator", *bind, *elect, "--id", "m-coordinator", *size]
    read = ["--checkpoint", "/models/m"]
    assert argv(config, "m-expert-0") == ["expert_server", *read, *elect, "--id", "m-expert-0", *bind]
    keyed = Config(membership="etcd://h:1", machine="m", listen="10.0.0.5", key="/k")
    for process in ids:
        flags = argv(keyed, process)
        assert flags[flags.index("--key") + 1] == "/k" and "--insecure" not in flags
    on_one_machine = Config(membership="etcd://h:1", machine="m")
    assert argv(on_one_machine, "m-router-0")[-2:] == ["--bind", "ipc:///run/r/m-router-0.0"]


def test_only_the_coordinator_keeps_its_address_over_a_restart() -> None:
    config = Config()
    assert argv(config, "expert-1", start=2)[-1] == "ipc:///run/r/expert-1.2"
    assert argv(config, "coordinator", start=2) == argv(config, "coordinator")


@pytest.mark.parametrize(
    ("config", "name"),
    [(Config("/models/m"), "m"), (Config("/models/m", served_model_name="x"), "x"), (Config(), "default")],
)
def test_the_served_model_has_a_name(config: Config, name: str) -> None:
    assert argv(config, "gateway-0")[-1] == name


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"expert_servers": 0}, "expert_servers"),
        ({"routers": 0}, "routers"),
        ({"replication": 4}, "replication 4"),
        ({"replication": 0}, "replication"),
        ({"replication": 0, "membership": "etcd://h:1"}, "replication"),
        ({"rejoin_grace_s": -1.0}, "rejoin_grace_s"),
        ({"max_restart_delay_s": nan}, "max_restart_delay_s"),
        ({"drain_timeout_s": -1.0}, "drain_timeout_s"),
        ({"port": 0}, "port 0"),
        ({"port": 65536}, "port 65536"),
        ({"router_args": "--max-num-seqs '8"}, "router_args: No closing quotation"),
    ],
)
def test_impossible_numbers_are_refused(values: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        Config(**values)


@pytest.mark.parametrize(
    ("host", "url"),
    [("0.0.0.0", "http://127.0.0.1:80"), ("::", "http://[::1]:80"), ("box", "http://box:80")],
)
def test_this_machine_reaches_a_wildcard_address_by_loopback(host: str, url: str) -> None:
    assert Config(host=host, port=80).url == url


def test_a_port_in_use_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert launcher.main(["--port", str(port)]) == 2
    assert f"moering serve: cannot listen on 127.0.0.1 port {port}: Address already in use" in capsys.readouterr().err


def test_a_model_that_is_no_directory_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main([str(tmp_path / "nothing"), "--port", str(free_port())]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error == [f"moering serve: {tmp_path}/nothing is neither `default` nor a checkpoint directory"]


def test_a_bad_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main([str(tmp_path), "--port", str(free_port())]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert f"{tmp_path}/config.json" in error[0]


def test_the_run_directory_is_private_and_its_path_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * launcher.MAX_RUN_DIRECTORY_CHARS)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    directory = launcher._make_run_directory()
    try:
        assert directory.stat().st_mode & 0o777 == 0o700
        assert len(str(directory)) < launcher.MAX_RUN_DIRECTORY_CHARS
    finally:
        directory.rmdir()
