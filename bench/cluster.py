"""A moering cluster as the benches see it: started as a subprocess or found at a URL, watched by /admin/status."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from moering.errors import MoeringError

# What the command line of a process of each kind contains: checked before a kill, as pids are used again.
_COMMAND = {
    "expert-server": "expert_server",
    "router": "router",
    "gateway": "gateway",
    "coordinator": "moering.coordinator",
}
STOP_S = 30.0
_held_ports: list[socket.socket] = []


@dataclass(frozen=True)
class Process:
    """One process of the cluster, as /admin/status lists it."""

    id: str
    kind: str
    pid: int
    state: str
    incarnation: int


@dataclass(frozen=True)
class Status:
    """/admin/status at one moment. `counters` are those of the routers, empty where none are shown."""

    at_s: float
    epoch: int
    failures_survivable: int
    processes: dict[str, Process]
    counters: dict[str, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, at_s: float, content: dict[str, Any]) -> Status:
        """Read the JSON of /admin/status; raises `MoeringError` where it is not that."""
        try:
            processes = {
                p["id"]: Process(p["id"], p["kind"], int(p["pid"]), p["state"], int(p["incarnation"]))
                for p in content["processes"]
            }
            counters = {name: int(n) for name, n in (content.get("router_counters") or {}).items()}
            return cls(at_s, int(content["epoch"]), int(content["failures_survivable"]), processes, counters)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise MoeringError(f"/admin/status holds no status: {type(e).__name__} {e}") from e

    def grown_since(self, earlier: Status) -> dict[str, int]:
        """By how much each counter grew."""
        return {name: n - earlier.counters.get(name, 0) for name, n in self.counters.items()}

    def online(self, kind: str) -> list[Process]:
        """The processes of `kind` that serve."""
        return [p for p in self.processes.values() if p.kind == kind and p.state == "ONLINE"]


async def read_status(session: aiohttp.ClientSession, url: str) -> Status:
    """The status now; raises `MoeringError`, `aiohttp.ClientError` or `TimeoutError`."""
    async with session.get(url.rstrip("/") + "/admin/status", timeout=aiohttp.ClientTimeout(total=5)) as response:
        if response.status != 200:
            raise MoeringError(f"/admin/status answered {response.status}: {(await response.text())[:200]}")
        return Status.parse(time.perf_counter(), await response.json())


@dataclass(frozen=True)
class Event:
    """An entry of the coordinator's timeline, at a time of `time.perf_counter`."""

    at_s: float
    type: str
    subject: str


async def read_events(session: aiohttp.ClientSession, url: str, since_s: float) -> list[Event]:
    """The timeline of this machine's cluster from a moment of `time.perf_counter` on; raises like `read_status`."""
    offset_s = time.time() - time.perf_counter()
    since = int((since_s + offset_s) * 1e6)  # their ids are microseconds since 1970
    async with session.get(f"{url.rstrip('/')}/admin/events?since={since}") as response:
        if response.status != 200:
            raise MoeringError(f"/admin/events answered {response.status}: {(await response.text())[:200]}")
        events = (await response.json())["events"]
    return [Event(float(e["at"]) - offset_s, e["type"], e["subject"]) for e in events]


def kill(process: Process) -> float:
    """SIGKILL one process of this machine and return when. Raises `MoeringError` when its pid is not of its kind."""
    try:
        command = command_of(process.pid)
    except OSError as e:
        raise MoeringError(f"{process.id}: there is no process {process.pid} on this machine") from e
    if _COMMAND[process.kind] not in command:
        raise MoeringError(f"{process.id}: process {process.pid} is no {process.kind}: {command[:200]}")
    at_s = time.perf_counter()
    os.kill(process.pid, signal.SIGKILL)
    return at_s


def command_of(pid: int) -> str:
    """The command line of a process of this machine; raises OSError. Of forked ones it has no ends of arguments."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


def free_port() -> int:
    """A port of the loopback interface that nobody else is given while this process lives; see `tests/ports.py`."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # with it a server can listen there all the same
    held.bind(("127.0.0.1", 0))
    _held_ports.append(held)
    return int(held.getsockname()[1])


@contextlib.asynccontextmanager
async def serving(
    model: str,
    log: Path,
    flags: Sequence[str],
    ready_s: float,
    *,
    replicated: bool = True,
    launcher: Sequence[str] = ("moering", "serve"),
) -> AsyncIterator[str]:
    """Run ``moering serve`` on a free port until the block ends; yields its URL once every expert has all its replicas,
    or, without `replicated`, once /ready answers 200. `launcher`: the module that serves, and what comes before MODEL.

    Its output goes to `log`. Raises `MoeringError` with the end of it when it does not get ready within `ready_s`.
    SIGTERM cancels the calling task, so that the cluster ends with the bench.
    """
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    argv = [sys.executable, "-m", *launcher, model, "--port", str(port), *flags]
    with log.open("wb") as out:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
    try:
        try:
            async with asyncio.timeout(ready_s):
                await _wait(url + "/ready", process)
                if replicated:
                    await _wait(url + "/admin/status", process, lambda status: status["under_target"] == 0)
        except (MoeringError, TimeoutError) as e:
            tail = log.read_text(errors="replace")[-2000:]
            what = "ready with all replicas" if replicated else "ready"
            raise MoeringError(f"moering serve did not get {what} within {ready_s:.0f} s ({e}). {log}:\n{tail}") from e
        yield url
    finally:
        await asyncio.to_thread(stop, process)


@contextlib.asynccontextmanager
async def found_or_started(
    url: str | None, model: str, log: Path, flags: Sequence[str], ready_s: float
) -> AsyncIterator[str]:
    """The cluster at `url`, else one of `serving`."""
    if url:
        yield url
        return
    async with serving(model, log, flags, ready_s) as started:
        yield started


async def _wait(
    url: str, launcher: subprocess.Popen[bytes], enough: Callable[[Any], bool] = lambda answer: True
) -> None:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
        while True:
            if launcher.poll() is not None:
                raise MoeringError(f"it exited with status {launcher.returncode}")
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(url) as response:
                    if response.status == 200 and enough(await response.json()):
                        return
            await asyncio.sleep(0.1)


def stop(process: subprocess.Popen[bytes], within_s: float = STOP_S) -> None:
    """SIGTERM, and SIGKILL when it has not ended within `within_s`."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(within_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
