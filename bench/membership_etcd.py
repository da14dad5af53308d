"""Streams while etcd and its elected coordinator die: ``python -m bench.membership_etcd --model default``.

Three etcd nodes, `moering serve --membership etcd://…` and a second coordinator. Every request runs once without a
failure; then, under the same requests, etcd's leader is killed, the elected coordinator is killed, and all of etcd is
gone for a minute. A phase without a failure comes first: its longest gap is what the others are held against.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp

from bench.account import Output, compare, total
from bench.client import new_session
from bench.cluster import kill, read_status, serving
from bench.command import Figures, checkpoint_path, run_bench, verdict
from bench.gaps import Window, intervals, within
from bench.load import first_model
from bench.streams import Recorded, Streams, fixed_requests
from bench.workload import Lengths
from moering.config import option
from moering.errors import ConfigError, MoeringError
from moering.process import command_line
from tests.etcd_nodes import EtcdNodes, running

BAR_MS = 150.0


@dataclass(frozen=True)
class Config:
    """Streams while etcd and its elected coordinator die."""

    model: str = option("default", "checkpoint directory, or 'default'")
    expert_servers: int = option(3, "expert servers to start")
    streams: int = option(8, "concurrent streams")
    requests: int = option(16, "distinct requests, repeated in turn")
    prompt_tokens: str = option("16-64", "prompt length, fixed or a range")
    output_tokens: str = option("100-200", "output length, fixed or a range")
    phase: float = option(20.0, "seconds of each phase but the last")
    etcd_gone: float = option(60.0, "seconds without any etcd")
    ready_timeout: float = option(600.0, "seconds within which the cluster must be ready")
    out: str = option("bench-membership-etcd", "directory for membership_etcd.json, logs and etcd's data")

    def __post_init__(self) -> None:
        if min(self.streams, self.phase, self.etcd_gone) <= 0 or self.requests < self.streams:
            raise ConfigError("streams, phase and etcd_gone must be positive, and requests no fewer than streams")


async def run(config: Config) -> Figures:
    """All phases; raises `MoeringError` when a request fails without a failure."""
    out = Path(config.out).resolve()
    vocab_size = json.loads((checkpoint_path(config.model) / "config.json").read_text())["vocab_size"]
    with contextlib.ExitStack() as stack:
        etcd = stack.enter_context(running(out, 3))
        flags = ["--membership", etcd.membership, "--machine", "a", "--expert-servers", str(config.expert_servers)]
        cluster = serving(config.model, out / "cluster.log", flags, config.ready_timeout)
        async with cluster as url, new_session(120.0) as session:
            stack.enter_context(_second_coordinator(etcd, out, config))
            bodies = fixed_requests(
                config.requests, await first_model(session, url), Lengths.parse(config.prompt_tokens),
                Lengths.parse(config.output_tokens), vocab_size, 0,
            )  # fmt: skip
            reference = Streams(session, url, bodies, config.streams)
            await reference.once()
            outputs = {r.request: Output.of(r.exchange) for r in reference.recorded if not r.exchange.error}
            if len(outputs) < len(bodies):
                raise MoeringError("a request failed before anything was killed")
            clients = Streams(session, url, bodies, config.streams)
            return await _phases(clients, outputs, etcd, config)


@contextlib.contextmanager
def _second_coordinator(etcd: EtcdNodes, out: Path, config: Config) -> Iterator[None]:
    argv = [*command_line("coordinator"), "--bind", f"ipc://{out}/b", "--id", "b", "--membership", etcd.membership]
    argv += ["--expert-servers", str(config.expert_servers)]
    with (out / "b.log").open("wb") as log:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        process.kill()
        process.wait()


async def _phases(clients: Streams, outputs: dict[int, Output], etcd: EtcdNodes, config: Config) -> Figures:
    windows: dict[str, Window] = {}
    elected = await _elected(clients.session, clients.url)

    async def phase(name: str, fault: Callable[[], Awaitable[None]], seconds: float) -> None:
        started_s = time.perf_counter()
        await fault()
        await asyncio.sleep(max(0.0, started_s + seconds - time.perf_counter()))
        windows[name] = Window(started_s, time.perf_counter())
        print(name, file=sys.stderr)

    async def nothing() -> None: ...

    leader = await asyncio.to_thread(etcd.leader)

    async def kill_leader() -> None:
        leader.signal(signal.SIGKILL)

    async def kill_elected() -> None:
        await asyncio.to_thread(leader.start, etcd.nodes)
        kill((await read_status(clients.session, clients.url)).processes[elected.partition("/")[0]])

    async def kill_etcd() -> None:
        await asyncio.to_thread(etcd.kill)

    async def start_etcd() -> None:
        await asyncio.to_thread(etcd.start)

    stop = asyncio.Event()
    streaming = asyncio.create_task(clients.until(stop))
    try:
        while not clients.flowing():
            await asyncio.sleep(0.01)
        await phase("no failure", nothing, config.phase)
        await phase("etcd's leader of three killed", kill_leader, config.phase)
        await phase("the elected coordinator killed", kill_elected, config.phase)
        successor = await _elected(clients.session, clients.url)
        await phase("all of etcd gone", kill_etcd, config.etcd_gone)
        await phase("etcd back", start_etcd, config.phase)
        ends = await _elected(clients.session, clients.url)
    finally:
        stop.set()
        await streaming
    return report(windows, clients.recorded, outputs) | {"elected": [elected, successor, ends]}


async def _elected(session: aiohttp.ClientSession, url: str) -> str:
    """Id and incarnation: one that was killed is started again under its id, and may win the next election."""
    elected = (await read_status(session, url)).online("coordinator")[0]
    return f"{elected.id}/{elected.incarnation}"


def report(windows: dict[str, Window], recorded: list[Recorded], outputs: dict[int, Output]) -> Figures:
    """The figures: per phase the longest gap of any stream, over all the account of tokens."""
    spans = [i for r in recorded for i in intervals(r.exchange)]
    account = total(compare(outputs[r.request], Output.of(r.exchange), r.exchange.error) for r in recorded)
    phases: dict[str, Any] = {
        name: {
            "seconds": round(window.end_s - window.start_s, 1),
            "longest_gap_ms": round(1000 * max(within(spans, window), default=0.0), 1),
        }
        for name, window in windows.items()
    }
    return {"phases": phases, "account": asdict(account), "clean": account.clean, "bar_ms": BAR_MS}


def table(figures: Figures) -> str:
    """The figures in markdown."""
    phases = figures["phases"]
    calm_ms = next(iter(phases.values()))["longest_gap_ms"]
    lines = ["| phase | seconds | longest gap, ms | less that without a failure, ms |", "|---|---|---|---|"]
    for name, p in phases.items():
        lines.append(f"| {name} | {p['seconds']:g} | {p['longest_gap_ms']:g} | {p['longest_gap_ms'] - calm_ms:.0f} |")
    worst_ms = max(p["longest_gap_ms"] for p in phases.values()) - calm_ms
    first, second, last = figures["elected"]
    lines += ["", " | ".join(["", *figures["account"], ""]).strip(), "|---" * len(figures["account"]) + "|"]
    lines += [" | ".join(["", *(str(n) for n in figures["account"].values()), ""]).strip(), ""]
    lines.append(f"elected: {first}, after its death {second}, at the end {last}")
    lines.append(f"no gap above {figures['bar_ms']:g} ms more: {verdict(worst_ms <= figures['bar_ms'])}")
    lines.append(f"nothing lost, duplicated, changed, no error: {verdict(figures['clean'])}")
    moved = first != second and second == last
    lines.append(f"another coordinator in office, and the same after etcd's absence: {verdict(moved)}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_bench("membership_etcd", Config, run, table, argv)


if __name__ == "__main__":
    sys.exit(main())
