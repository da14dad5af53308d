"""Kill and rejoin, again and again: what survives must not grow. `python -m tests.faults.soak 200`, or `make soak`.

Each cycle kills one expert server under load, checks the streams, waits until it is back, and then counts the file
descriptors, threads, shared mappings and resident memory of the processes that were never killed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from tests.faults.arena import AT_ONCE, STREAMS, TOKENS
from tests.integration.cluster import SERVERS, Cluster, serving, wait_for
from tests.integration.streams import Streams, bodies, check_equal
from tests.tiny import write_checkpoint

FLAGS = (*AT_ONCE, "--rejoin-grace-s", "10")
SURVIVORS = ("coordinator", "router-0", "gateway-0")
RESIDENT_SHARE, RESIDENT_BYTES = 0.03, 4 << 20
"""Resident memory may differ by so much between two thirds of a run: allocators give back when they please."""


@dataclass(frozen=True)
class Held:
    """What one process holds at the end of a cycle."""

    descriptors: int
    threads: int
    shared_maps: int
    resident_bytes: int

    @classmethod
    def by(cls, pid: int) -> Held:
        """Count."""
        process = psutil.Process(pid)
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
        shared = sum("/dev/shm/" in line or "/memfd:" in line for line in maps)
        return cls(process.num_fds(), process.num_threads(), shared, process.memory_info().rss)


def soak(checkpoint: Path, directory: Path, cycles: int, show: Callable[[str], None]) -> dict[str, list[Held]]:
    """Run so many cycles; what each survivor held after each."""
    with serving(checkpoint, directory, FLAGS) as cluster:
        pids = {i: int(cluster.process(i)["pid"]) for i in SURVIVORS} | {"launcher": cluster.launcher.pid}
        reference = Streams(cluster.url, bodies(STREAMS, TOKENS)).finish()
        history: dict[str, list[Held]] = {name: [] for name in pids}
        for cycle in range(cycles):
            _kill_one(cluster, SERVERS[cycle % len(SERVERS)], reference)
            wait_for("the clients' connections are closed", lambda: not _clients(pids["gateway-0"]))
            for name, pid in pids.items():
                history[name].append(Held.by(pid))
            show(f"cycle {cycle + 1}: {json.dumps({n: list(asdict(h[-1]).values()) for n, h in history.items()})}")
        assert {i: cluster.process(i)["pid"] for i in SURVIVORS} == {i: pids[i] for i in SURVIVORS}
    return history


def _kill_one(cluster: Cluster, victim: str, reference: list[object]) -> None:
    streams = Streams(cluster.url, bodies(STREAMS, TOKENS))
    streams.wait_tokens(2)
    killed = cluster.kill(victim)
    check_equal(streams.finish(), reference)
    cluster.wait_replaced(killed)
    wait_for("nothing is under way", lambda: cluster.counters_after(0))


def _clients(gateway: int) -> list[object]:
    """Connections over tcp that the gateway has not closed yet. Its links to the cluster are no tcp here."""
    return [c for c in psutil.Process(gateway).net_connections("tcp") if c.status != psutil.CONN_LISTEN]


def check(history: dict[str, list[Held]]) -> None:
    """The last third of the cycles holds no more than the one before; in the first everybody still warms up."""
    for name, held in history.items():
        third = len(held) // 3
        middle, last = held[third : 2 * third], held[2 * third :]
        for field in ("descriptors", "threads", "shared_maps"):
            before, after = (min(getattr(h, field) for h in part) for part in (middle, last))
            assert after <= before, f"{name}: {field} grew from {before} to {after}"
        before, after = (min(h.resident_bytes for h in part) for part in (middle, last))
        assert after <= before * (1 + RESIDENT_SHARE) + RESIDENT_BYTES, f"{name}: {before} → {after} bytes resident"


def main(cycles: int) -> None:
    """Print each cycle, and fail where something grew."""
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = write_checkpoint(Path(directory) / "tiny")
        check(soak(checkpoint, Path(directory), cycles, lambda line: print(line, flush=True)))
    print(f"{cycles} cycles of kill and rejoin: nothing has grown")


if __name__ == "__main__":
    main(int(sys.argv[1]))
