"""Two hosts with a launcher each: a coordinator, a gateway, a router and two expert servers; etcd on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

from moering.cluster_key import ClusterKey
from moering.errors import MoeringError
from moering.http_client import get_json
from moering.status import fetch
from tests.etcd_nodes import binary
from tests.hosts.network import OWN_ADDRESS, Network
from tests.integration.cluster import REPO, wait_for

HOSTS = ("a", "b")
KEY = "of-the-operator"
PORT, ETCD_PORT = 8000, 2379
OWN = ("coordinator", "expert-0", "expert-1", "router-0", "gateway-0")
KINDS = {"coordinator", "expert-server", "router", "gateway"}


class Cluster:
    """Seen from a third host: by HTTP, and by signals to its processes."""

    def __init__(self, network: Network, checkpoint: Path, directory: Path) -> None:
        self.network, self._checkpoint, self.directory = network, checkpoint, directory
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        ClusterKey.create(str(directory / "cluster.key"))

    def url(self, host: str) -> str:
        return f"http://{self.network.addresses[host]}:{PORT}"

    def log(self, host: str) -> str:
        return (self.directory / f"{host}.log").read_text(errors="replace")

    def start(self, host: str) -> None:
        address = self.network.addresses[host]
        argv = [sys.executable, "-m", "moering", "serve", str(self._checkpoint), "--machine", host]
        argv += ["--membership", f"etcd://{OWN_ADDRESS}:{ETCD_PORT}", "--listen", address]
        argv += ["--key", str(self.directory / "cluster.key")]
        argv += ["--host", address, "--port", str(PORT), "--expert-servers", "2", "--zones", host]
        argv += ["--coordinator-args", "--expert-servers 4", "--max-restart-delay-s", "0"]
        argv += ["--expert-server-args=--no-nice", "--router-args", "--threads 1"]
        env = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "MOERING_ADMIN_KEY": KEY}
        with (self.directory / f"{host}.log").open("wb") as out:
            self._processes[host] = subprocess.Popen(
                [*self.network.inside(host), *argv], stdout=out, stderr=subprocess.STDOUT, cwd=REPO, env=env
            )

    def stop(self) -> None:
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()

    def status(self, host: str) -> dict[str, Any]:
        return dict(fetch(self.url(host), key=KEY))

    def process(self, host: str, server_id: str) -> dict[str, Any]:
        return next(p for p in self.status(host)["processes"] if p["id"] == server_id)

    def whole(self, host: str) -> bool:
        """By what this host's gateway knows: all processes of both serve, and any one of the hosts may go."""
        try:
            get_json(f"{self.url(host)}/ready")
            status = self.status(host)
        except MoeringError:
            return False
        online = {p["id"] for p in status["processes"] if p["state"] == "ONLINE" and p["kind"] != "coordinator"}
        wanted = {f"{h}-{i}" for h in HOSTS for i in OWN if i != "coordinator"}
        passed_over = [p["id"] for p in status["processes"] if p["passed_over"]]
        return online == wanted and status["failures_survivable"] >= 1 and not passed_over

    def wait_whole(self) -> None:
        wait_for(f"both hosts are whole, see {self.directory}", lambda: all(map(self.whole, HOSTS)))

    def kill(self, host: str, server_id: str) -> None:
        """SIGKILL to the process of this id there, found by its command line: its pid is known on its host only."""
        outer = psutil.Process(self._processes[host].pid)
        (found,) = [p for p in outer.children(recursive=True) if f"--id {server_id}" in " ".join(p.cmdline())]
        found.send_signal(signal.SIGKILL)


@contextmanager
def etcd(directory: Path) -> Iterator[None]:
    """One node, on this machine."""
    url, peer = f"http://{OWN_ADDRESS}:{ETCD_PORT}", f"http://{OWN_ADDRESS}:{ETCD_PORT + 1}"
    argv = [binary(), "--data-dir", str(directory / "etcd"), "--log-level", "error", "--listen-client-urls", url]
    argv += ["--advertise-client-urls", url, "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
    argv += ["--initial-cluster", f"default={peer}"]
    with (directory / "etcd.log").open("wb") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_for("etcd serves", lambda: _healthy(url))
        yield
    finally:
        process.kill()
        process.wait()


def _healthy(url: str) -> bool:
    try:
        return bool(get_json(f"{url}/health", timeout_s=1.0).get("health") == "true")
    except MoeringError:
        return False


@contextmanager
def cluster(network: Network, checkpoint: Path, directory: Path) -> Iterator[Cluster]:
    """Running and whole; nothing of it is left at the end."""
    made = Cluster(network, checkpoint, directory)
    with ExitStack() as stack:
        stack.enter_context(etcd(directory))
        stack.callback(made.stop)
        for host in HOSTS:
            made.start(host)
        made.wait_whole()
        yield made
