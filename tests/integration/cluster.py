"""`moering serve` as a process, watched from outside: its HTTP endpoints, its pids, its log."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moering.http_client import HttpError, get_json
from moering.status import fetch
from tests.ports import free_port

DEADLINE_S = 60.0
LOOK_S = 0.02
SERVERS = ("expert-0", "expert-1", "expert-2")
REPO = Path(__file__).parents[2]
BRISK = {"MOERING_NICE": "no"}
"""Expert servers start at normal priority: beside other work on a small machine the low one is none at all."""
VERBOSE = {"MOERING_LOG_LEVEL": "DEBUG"}
"""Tests look for connections and for single views in the log."""
TWO_ROUTERS = ("--routers", "2", "--router-args", "--threads 1 --no-nice")


def wait_for(what: str, condition: Callable[[], Any], within_s: float = DEADLINE_S) -> Any:
    """Look again and again until `condition` gives something true, and return that."""
    pause, until_s = threading.Event(), time.monotonic() + within_s
    while not (result := condition()):
        assert time.monotonic() < until_s, f"not within {within_s:g} s: {what}"
        pause.wait(LOOK_S)
    return result


class Cluster:
    """A running cluster with replication 2, of three expert servers unless `flags` say another number."""

    def __init__(
        self,
        checkpoint: Path,
        log: Path,
        run_directory: str,
        flags: Sequence[str] = (),
        program: Sequence[str] = ("moering", "serve"),
        environment: Mapping[str, str] = {},
    ) -> None:
        """`program`: the module that is run and its first arguments, where it is not `moering serve` itself."""
        self.checkpoint, self.log = checkpoint, log
        self.servers = tuple(f"expert-{i}" for i in range(_count(flags, "--expert-servers", len(SERVERS))))
        self.routers = tuple(f"router-{i}" for i in range(_count(flags, "--routers", 1)))
        self.prefix = flags[flags.index("--machine") + 1] + "-" if "--machine" in flags else ""
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        argv = [sys.executable, "-m", *program, str(checkpoint), "--port", str(port), *flags]
        env = os.environ | {"XDG_RUNTIME_DIR": run_directory, "OMP_NUM_THREADS": "1", **BRISK, **VERBOSE, **environment}
        with log.open("wb") as out:
            self.launcher = subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT, cwd=REPO, env=env)

    def wait_ready(self) -> None:
        wait_for(f"ready, see {self.log}", lambda: self.launcher.poll() is not None or self.settled())
        assert self.launcher.returncode is None, self.log.read_text()

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        self.launcher.terminate()
        try:
            return self.launcher.wait(DEADLINE_S)
        finally:
            self.launcher.kill()

    def logged(self, text: str) -> int:
        """How many lines of the log contain `text`."""
        return sum(text in line for line in self.log.read_text(errors="replace").splitlines())

    def times_lost(self, expert_server: str) -> int:
        """How often a router has lost its connection to this expert server."""
        return self.logged(f" router.exchange: {self.prefix}{expert_server}: ")

    # --- what /admin/status shows ---

    def status(self) -> dict[str, Any]:
        return dict(fetch(self.url))

    def process(self, server_id: str) -> dict[str, Any]:
        return next(p for p in self.status()["processes"] if p["id"] == self.prefix + server_id)

    def settled(self) -> bool:
        """All processes serve, requests are accepted and one failure is survived."""
        try:
            get_json(f"{self.url}/ready")
            status = self.status()
        except HttpError:
            return False
        online = {p["id"] for p in status["processes"] if p["state"] == "ONLINE"}
        kinds = {p["kind"] for p in status["processes"]}
        own = {self.prefix + i for i in (*self.servers, *self.routers, "gateway-0")}
        return online >= own and "coordinator" in kinds and status["failures_survivable"] == 1

    def wait_settled(self) -> None:
        wait_for("all processes serve and one failure is survived", self.settled)

    def kill(self, *server_ids: str, number: int = signal.SIGKILL) -> list[dict[str, Any]]:
        """Send a signal to these processes at once; what the status showed of them."""
        victims = [self.process(i) for i in server_ids]
        for victim in victims:
            assert _is_child_of(victim["pid"], self.launcher.pid), victim
        for victim in victims:
            os.kill(victim["pid"], number)
        return victims

    @contextmanager
    def stopped(self, server_id: str) -> Iterator[None]:
        """The process stands still meanwhile."""
        self.kill(server_id, number=signal.SIGSTOP)
        try:
            yield
        finally:
            self.kill(server_id, number=signal.SIGCONT)

    def wait_replaced(self, victims: Sequence[dict[str, Any]]) -> None:
        """Each has been started again, and the cluster is whole."""
        wait_for("the dead are back with new incarnations", lambda: all(map(self.is_replaced, victims)))
        self.wait_settled()

    def is_replaced(self, victim: dict[str, Any]) -> bool:
        """Whether it has been started again and serves."""
        now = [p for p in self.status()["processes"] if p["id"] == victim["id"]]
        return bool(now) and now[0]["state"] == "ONLINE" and now[0]["incarnation"] != victim["incarnation"]

    # --- what the router counted ---

    def counters(self) -> dict[str, int]:
        return {name: int(n) for name, n in self.status()["router_counters"].items()}

    def counters_after(self, forwards: int) -> dict[str, int]:
        """The router's counters once it is idle after more than `forwards` forwards; it reports once a second."""
        return dict(wait_for("an idle router's report", lambda: self._idle_counters(forwards)))

    def _idle_counters(self, forwards: int) -> dict[str, int] | None:
        before = self.counters()
        busy = [v for k, v in self.metrics().items() if k in BUSY and v]
        after = self.counters()  # the figures between the two belong to the same report
        return after if not busy and before == after and after.get("forwards", 0) > forwards else None

    def metrics(self) -> dict[str, float]:
        """All samples without labels."""
        return metrics(self.url)


def metrics(url: str) -> dict[str, float]:
    """All samples without labels of the gateway at `url`."""
    return {name: value for name, value in samples(url) if "{" not in name}


def samples(url: str) -> list[tuple[str, float]]:
    """All samples of the gateway at `url`, by their names with the labels."""
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), DEADLINE_S) as s:
        s.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        text = s.makefile("rb").read().decode()
    found = (line.rpartition(" ") for line in text.splitlines() if line.startswith("moering_"))
    return [(name, float(value)) for name, _, value in found]


BUSY = ("moering_router_requests_running", "moering_router_requests_waiting", "moering_router_forwards_in_flight")


def _count(flags: Sequence[str], flag: str, default: int) -> int:
    return int(flags[flags.index(flag) + 1]) if flag in flags else default


def _is_child_of(pid: int, launcher: int) -> bool:
    """Whether the process is a child of the launcher: pids are used again."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == launcher


@contextmanager
def serving(
    checkpoint: Path,
    directory: Path,
    flags: Sequence[str] = (),
    program: Sequence[str] = ("moering", "serve"),
    environment: Mapping[str, str] = {},
) -> Iterator[Cluster]:
    """A cluster that is ready; nothing of it is left at the end."""
    with tempfile.TemporaryDirectory(prefix="mo-", dir="/tmp") as run_directory:  # short: a socket's path is limited
        cluster = Cluster(checkpoint, directory / "cluster.log", run_directory, flags, program, environment)
        try:
            cluster.wait_ready()
            yield cluster
        finally:
            cluster.stop()
