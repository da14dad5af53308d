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

from bench.cluster import command_of, stop
from bench.engine_client import first_router
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
    flags = [*flags, "--micro-batches", "1"]  # none waits for experts
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
            stop(process, STOP_S)
            assert process.stdout is not None
            process.stdout.close()


def _wait_until_bound(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline_s = time.monotonic() + BOUND_S
    while not Path(address.removeprefix("ipc://")).exists():
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise MoeringError(f"{process.args!r} did not start; see {log}:\n{log.read_text(errors='replace')[-1500:]}")
        time.sleep(0.05)


async def coordinator_address(url: str) -> str:
    """Where further members of the cluster behind `url` join: what its router was told."""
    pid = (await first_router(url))["pid"]
    argv = command_of(pid).split()
    return argv[argv.index("--join") + 1]
