"""Processes that a bench starts beside a cluster: engines with all experts inside, and members of the cluster."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from moering.commands import VISIBLE_GPUS
from moering.errors import MoeringError

STOP_S, BOUND_S = 10.0, 90.0


@dataclass(frozen=True)
class Place:
    """Where a process computes, and what it computes."""

    checkpoint: Path
    device: str
    gpu: str = ""  # the one that it sees

    def flags(self) -> list[str]:
        """Of any process that computes."""
        return ["--checkpoint", str(self.checkpoint), "--device", self.device]


@contextlib.contextmanager
def in_process(place: Place, flags: Sequence[str], log: Path) -> Iterator[str]:
    """The engine with its experts in its own process; its address, once it can be asked."""
    with started("bench.in_process", place, flags, log) as (process, address):
        assert process.stdout is not None
        if b"listening" not in process.stdout.readline():
            raise MoeringError(f"the in-process engine did not start; see {log}")
        yield address


@contextlib.contextmanager
def started(
    module: str, place: Place, flags: Sequence[str], log: Path, env: dict[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """``python -m module`` with an address of its own, once it is bound to it; ended with the block."""
    with tempfile.TemporaryDirectory(prefix="mo-") as run_directory, log.open("wb") as out:
        address = f"ipc://{run_directory}/engine"
        gpu = {VISIBLE_GPUS: place.gpu} if place.gpu else {}
        argv = [sys.executable, "-m", module, *place.flags(), "--bind", address, *flags]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=out, env=os.environ | gpu | (env or {}))
        try:
            _wait_until_bound(process, address, log)
            yield process, address
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()


def _wait_until_bound(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline_s = time.monotonic() + BOUND_S
    while not Path(address.removeprefix("ipc://")).exists():
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise MoeringError(f"{process.args!r} did not start; see {log}:\n{log.read_text(errors='replace')[-1500:]}")
        time.sleep(0.05)


async def members(url: str) -> list[dict[str, Any]]:
    """The processes of the cluster, as /admin/status lists them."""
    async with aiohttp.ClientSession() as session, session.get(url + "/admin/status") as response:
        processes: list[dict[str, Any]] = (await response.json())["processes"]
    return processes


async def coordinator_address(url: str) -> str:
    """Where further members of the cluster behind `url` join: what its router was told."""
    pid = next(p["pid"] for p in await members(url) if p["kind"] == "router")
    argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    return argv[argv.index("--join") + 1]
