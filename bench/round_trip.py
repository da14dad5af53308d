"""One dispatch against the raw zmq round trip of the same bytes: ``python -m bench.round_trip --model default``.

Ours: `router.exchange.Exchange` to the expert server of a running cluster, from `submit` until the rows are in place.
Raw: a DEALER that blocks on a ROUTER in another process, frames of the same sizes, the same kind of endpoint. Both in
turn, in blocks. What the server says that it computed is taken off ours, trip by trip. With ``--endpoint frames`` rows
travel in frames over tcp, as between machines, not in shared memory. With ``--key`` ours are encrypted, and raw is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.cluster import serving
from bench.command import Figures, checkpoint_path, run_bench, verdict
from bench.report import quantile
from bench.round_trip_ends import Batch, Ours, Raw, echo, frame_bytes
from moering import transport
from moering.checkpoint import Checkpoint
from moering.cluster_key import ClusterKey
from moering.config import option
from moering.status import fetch

BAR = 2.0
TCP = "tcp://127.0.0.1:*"
WARM_UP = 30
ONE_SERVER = ("--expert-servers", "1", "--replication", "1")


@dataclass(frozen=True)
class Config:
    """One dispatch round trip against the raw zmq round trip of the same bytes."""

    model: str = option("default", "checkpoint directory, or 'default'")
    endpoint: str = option("ipc", "kind of endpoint", choices=("ipc", "tcp", "frames"))
    key: str = option("", "file with a cluster key, of `moering keygen`")
    rows: tuple[str, ...] = option(("1", "8", "32"), "rows of a dispatch, separated by commas")
    rounds: int = option(10, "rounds, each a block of both")
    block: int = option(100, "round trips of a block")
    ready_timeout: float = option(600.0, "seconds within which the cluster must be ready")
    out: str = option("bench-round-trip", "directory for round_trip.json and the cluster's log")


@dataclass
class Times:
    """µs of all trips of one size: raw, ours, and what the server computed of each of ours."""

    raw: list[float]
    ours: list[float]
    compute: list[float]


async def run(config: Config) -> Figures:
    """Measure on a cluster with one expert server."""
    flags = list(ONE_SERVER)
    if config.endpoint != "ipc":
        flags.append(f"--expert-server-args=--bind {TCP}")
    if config.key:
        flags += ["--key", config.key]
        transport.use_key(ClusterKey.read(config.key))
    checkpoint = Checkpoint(checkpoint_path(config.model))
    with contextlib.closing(checkpoint):
        async with serving(config.model, Path(config.out, "cluster.log"), flags, config.ready_timeout) as url:
            return await asyncio.to_thread(_measure, config, checkpoint, url)


def _measure(config: Config, checkpoint: Checkpoint, url: str) -> Figures:
    server = next(p for p in fetch(url)["processes"] if p["kind"] == "expert-server")
    if config.endpoint == "frames":  # an address of this machine that does not look like one
        server["address"] = server["address"].replace("127.0.0.1", "0.0.0.0")
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        endpoint = f"ipc://{directory}/echo" if config.endpoint == "ipc" else TCP
        raw = stack.enter_context(contextlib.closing(Raw(stack.enter_context(echo(endpoint)))))
        ours = stack.enter_context(contextlib.closing(Ours(checkpoint, server)))
        rows = [int(n) for n in config.rows]
        return {"rows": {n: figures(_trips(config, checkpoint, raw, ours, n)) for n in rows}, "bar": BAR}


def _trips(config: Config, checkpoint: Checkpoint, raw: Raw, ours: Ours, rows: int) -> Times:
    raw.resize(*frame_bytes(rows, checkpoint.top_k, checkpoint.hidden_size))
    batch, times = Batch.random(rows, checkpoint), Times([], [], [])
    for _ in range(WARM_UP):
        raw.trip()
        ours.trip(batch)
    for _ in range(config.rounds):
        times.raw += [raw.trip() for _ in range(config.block)]
        for _ in range(config.block):
            whole_us, compute_us = ours.trip(batch)
            times.ours.append(whole_us)
            times.compute.append(compute_us)
    return times


def figures(times: Times) -> dict[str, float]:
    """Medians and p99 in µs; `ratio` is of the medians of (ours less the compute) and of raw."""
    rest = [whole - compute for whole, compute in zip(times.ours, times.compute, strict=True)]
    samples = {"raw": times.raw, "ours": times.ours, "compute": times.compute, "rest": rest}
    result = {f"{name}_{q}_us": quantile(v, p) for name, v in samples.items() for q, p in (("p50", 0.5), ("p99", 0.99))}
    return result | {"ratio": round(median(rest) / median(times.raw), 3)}


def table(result: Figures) -> str:
    """The figures in markdown."""
    lines = [f"| rows | raw, µs p50 (p99) | ours | compute | ours less compute | by raw, bar {result['bar']:g} |"]
    lines.append("|---" * 6 + "|")
    for n, f in result["rows"].items():
        cells = (
            f"{f[f'{name}_p50_us']:.0f} ({f[f'{name}_p99_us']:.0f})" for name in ("raw", "ours", "compute", "rest")
        )
        lines.append(f"| {n} | {' | '.join(cells)} | {f['ratio']:.2f}: {verdict(f['ratio'] <= result['bar'])} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_bench("round_trip", Config, run, table, argv)


if __name__ == "__main__":
    sys.exit(main())
