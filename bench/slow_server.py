"""A slow expert server and a stopped one, under load: ``python -m bench.slow_server --model default``.

One run on one cluster: healthy, then one server that runs a tenth of the time (SIGSTOP and SIGCONT in turn), then
healthy again, then one that stands still for a while and goes on. Tokens per second over time and the gaps come from
the clients' side, rows and hedges from the router's counters.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.client import new_session
from bench.cluster import Process, Status, found_or_started, read_status
from bench.command import Figures, run_bench, verdict
from bench.duty_cycle import DutyCycle
from bench.gaps import Window, intervals, tokens_per_s, within
from bench.load import first_model
from bench.report import distribution
from bench.streams import Streams, fixed_requests
from bench.workload import Lengths
from moering.config import option
from moering.errors import ConfigError, MoeringError

COUNTERS_S = 1.5
"""Routers send their counters once a second."""
EXTRA_BAR, SHARE_BAR, WITHIN_S, GAP_BAR_MS = 0.03, 0.8, 5.0, 500.0


@dataclass(frozen=True)
class Config:
    """Throughput with one slow expert server, the price of hedging, and the gap when one stands still."""

    model: str = option("default", "model to serve: a checkpoint directory, or 'default'")
    url: str | None = option(None, "use this cluster of this machine instead of starting one")
    serve_flags: tuple[str, ...] = option((), "flags of moering serve, separated by commas")
    ready_timeout: float = option(600.0, "seconds within which the started cluster must be ready")
    streams: int = option(8, "concurrent streams")
    output_tokens: int = option(200, "tokens of each request")
    vocab_size: int = option(259, "prompt ids are below this")
    factor: float = option(10.0, "how many times slower the server is to be")
    warm_s: float = option(10.0, "seconds of load before anything is measured")
    healthy_s: float = option(30.0, "seconds without a fault")
    slow_s: float = option(30.0, "seconds with a slow server, then as many until it is used again")
    stops: int = option(5, "times that a server is stopped")
    stop_s: float = option(2.0, "seconds that it stands still; below the 3 s after which it would be evicted")
    timeout: float = option(120.0, "seconds without a byte after which a request counts as failed")
    out: str = option("bench-slow-server", "directory for slow_server.json and the cluster's log")

    def __post_init__(self) -> None:
        if self.factor <= 1 or min(self.healthy_s, self.slow_s) <= WITHIN_S + 1:
            raise ConfigError(f"factor must be above 1, healthy_s and slow_s above {WITHIN_S + 1:g}")


async def run(config: Config) -> Figures:
    """All phases."""
    log = Path(config.out, "cluster.log")
    cluster = found_or_started(config.url, config.model, log, config.serve_flags, config.ready_timeout)
    async with cluster as url, new_session(config.timeout) as session:
        model = await first_model(session, url)
        lengths = Lengths(16, 64), Lengths(config.output_tokens, config.output_tokens)
        bodies = fixed_requests(2 * config.streams, model, *lengths, config.vocab_size, 0)
        clients, stop = Streams(session, url, bodies, config.streams), asyncio.Event()
        streaming = asyncio.create_task(clients.until(stop))
        try:
            figures = await Phases(config, clients).run()
        finally:
            stop.set()
            await streaming
    errors = sum(r.exchange.error is not None for r in clients.recorded)
    return figures | {"requests": len(clients.recorded), "errors": errors}


class Phases:
    """The phases, one after the other, under the load of `clients`."""

    def __init__(self, config: Config, clients: Streams) -> None:
        self._config, self._clients = config, clients

    async def run(self) -> Figures:
        """Everything in order."""
        c = self._config
        await asyncio.sleep(c.warm_s)
        healthy = await self._phase(c.healthy_s)
        victim = self._victim(await self._status())
        with DutyCycle(victim.pid, c.factor):
            slow = await self._phase(c.slow_s)
        recovery = await self._phase(c.slow_s)
        stops = [await self._stop(n) for n in range(c.stops)]
        return {"healthy": healthy, "slow": slow, "recovery": recovery, "stops": stops}

    async def _status(self) -> Status:
        return await read_status(self._clients.session, self._clients.url)

    @staticmethod
    def _victim(status: Status, n: int = 0) -> Process:
        servers = sorted(status.online("expert-server"), key=lambda p: p.id)
        if len(servers) < 2:
            raise MoeringError("this bench needs at least two expert servers on this machine")
        return servers[n % len(servers)]

    async def _phase(self, seconds: float) -> dict[str, Any]:
        """Load for so long: tokens/s of each second, the gaps, and by how much the counters grew."""
        before, started_s = await self._status(), time.perf_counter()
        await asyncio.sleep(max(seconds, COUNTERS_S))
        ended_s = time.perf_counter()
        grown = (await self._status()).grown_since(before)
        edges = range(int(ended_s - started_s))
        return {
            "tokens_per_s": self._rate(Window(started_s, ended_s)),
            "each_second": [self._rate(Window(started_s + n, started_s + n + 1)) for n in edges],
            "gap_ms": self._gaps(Window(started_s, ended_s)),
            "counters": grown,
        }

    async def _stop(self, n: int) -> dict[str, Any]:
        """One server stands still for a while; is it the same one, with what it held, afterwards?"""
        before = self._victim(await self._status(), n)
        started_s = time.perf_counter()
        os.kill(before.pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(self._config.stop_s)
        finally:
            os.kill(before.pid, signal.SIGCONT)
        gaps = self._gaps(Window(started_s, time.perf_counter()))
        await asyncio.sleep(4.0)  # until it is used again
        after = (await self._status()).processes.get(before.id)
        return {"server": before.id, "gap_ms": gaps, "came_back": after == before}

    def _exchanges(self) -> list[Any]:
        return [r.exchange for r in self._clients.recorded] + list(self._clients.running.values())

    def _rate(self, window: Window) -> float:
        return round(tokens_per_s(self._exchanges(), [window]) or 0.0, 2)

    def _gaps(self, window: Window) -> dict[str, float | None]:
        return distribution(gap for e in self._exchanges() for gap in within(intervals(e), window))


def extra_share(counters: dict[str, int]) -> float:
    """Rows computed for hedges and probes, over all others."""
    extra = counters.get("hedged_rows", 0) + counters.get("probe_rows", 0)
    return extra / max(1, counters.get("rows", 0))


def table(figures: Figures) -> str:
    """The figures in markdown, with the bars."""
    healthy, slow = figures["healthy"], figures["slow"]
    lines = ["| phase | tokens/s | gap p50 | p99 | max (ms) | extra rows |", "|---" * 6 + "|"]
    for name in ("healthy", "slow", "recovery"):
        phase = figures[name]
        gap = phase["gap_ms"]
        share = f"{100 * extra_share(phase['counters']):.2f} %"
        lines.append(f"| {name} | {phase['tokens_per_s']} | {gap['p50']} | {gap['p99']} | {gap['max']} | {share} |")
    after = slow["each_second"][int(WITHIN_S) :]
    share = sum(after) / max(1, len(after)) / max(1e-9, healthy["tokens_per_s"])
    extra = extra_share(healthy["counters"])
    lines += [
        "",
        f"one server slow, tokens/s of each second: {' '.join(f'{r:.0f}' for r in slow['each_second'])}",
        f"from {WITHIN_S:g} s on {share:.0%} of healthy; bar {SHARE_BAR:.0%}, {verdict(share >= SHARE_BAR)}",
        f"extra rows when healthy {extra:.2%}; bar {EXTRA_BAR:.0%}, {verdict(extra <= EXTRA_BAR)}",
        *(_stop_line(stop, healthy["gap_ms"]["p99"] or 0.0) for stop in figures["stops"]),
    ]
    lines.append(f"{figures['requests']} requests, {figures['errors']} errors")
    return "\n".join(lines)


def _stop_line(stop: dict[str, Any], usual_ms: float) -> str:
    gap, same = stop["gap_ms"]["max"] or 0.0, stop["came_back"]
    back = "it is used again as it was" if same else "it did NOT come back as it was"
    return (
        f"{stop['server']} stopped: longest gap {gap:.0f} ms, {verdict(gap <= GAP_BAR_MS + usual_ms and same)}; {back}"
    )


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_bench("slow_server", Config, run, table, argv)


if __name__ == "__main__":
    sys.exit(main())
