"""What clients that never read cost everybody else: ``python -m bench.silent_readers --model default``.

Eight streams flow throughout. Fifty clients send a streaming request for many tokens and read nothing, until the
gateway has cut them all off. Then fifty clients send the same requests and do read: what fifty more requests cost in
any case. The streams' inter-token latency beside the silent ones is held against that.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.client import exchange, new_session
from bench.cluster import read_status, serving
from bench.command import Figures, run_bench, verdict
from bench.gaps import Interval, Window, intervals, within
from bench.load import first_model
from bench.process_memory import MB, memory_of
from bench.report import distribution, quantile
from bench.silent_client import SilentClients
from bench.streams import Streams, fixed_requests
from bench.workload import Lengths
from moering.config import option
from moering.errors import ConfigError, MoeringError

LATENCY_BAR = 1.1  # beside silent clients, by beside reading ones
MEMORY_BAR_BYTES = 1 * MB  # of the gateway, for each silent client
TOLERANCE = 1.5  # of the stall timeout: the guard looks eight times in it
LOOK_S = 0.1


@dataclass(frozen=True)
class Config:
    """What clients that never read cost everybody else."""

    model: str = option("default", "checkpoint directory, or 'default'")
    serve_flags: tuple[str, ...] = option((), "further flags of moering serve, separated by commas")
    ready_timeout: float = option(600.0, "seconds within which the cluster must be ready")
    silent: int = option(50, "clients that never read")
    stall_timeout: float = option(5.0, "the gateway's --stall-timeout-s")
    limit: float = option(300.0, "seconds within which all of them must be cut off")
    streams: int = option(8, "streams beside them")
    output_tokens: int = option(200, "tokens of each request of those")
    vocab_size: int = option(259, "prompt ids are below this")
    calm: float = option(10.0, "seconds of the streams alone, before and after")
    timeout: float = option(120.0, "seconds without a byte after which a request counts as failed")
    out: str = option("bench-silent-readers", "directory for silent_readers.json and the cluster's log")

    def __post_init__(self) -> None:
        if min(self.silent, self.streams, self.stall_timeout, self.calm) <= 0:
            raise ConfigError("silent, streams, stall_timeout and calm must be positive")


async def run(config: Config) -> Figures:
    """Measure; raises `MoeringError` when a stream fails or a silent client outlives the limit."""
    log = Path(config.out, "cluster.log")
    flags = [f"--gateway-args=--stall-timeout-s {config.stall_timeout}", *config.serve_flags]
    async with (
        serving(config.model, log, flags, config.ready_timeout) as url,
        new_session(config.timeout) as session,
    ):
        model = await first_model(session, url)
        lengths = Lengths(16, 64), Lengths(config.output_tokens, config.output_tokens)
        bodies = fixed_requests(config.streams, model, *lengths, config.vocab_size, 0)
        await Streams(session, url, bodies, config.streams).once()  # first use of everything: not counted
        processes = (await read_status(session, url)).processes.values()
        pids = {p.id: p.pid for p in processes if p.kind in ("gateway", "router")}
        streams, stop = Streams(session, url, bodies, config.streams), asyncio.Event()
        streaming = asyncio.create_task(streams.until(stop))
        try:
            figures, windows = await _phases(config, streams, model, pids)
        finally:
            stop.set()
            await streaming
        return figures | _latencies(streams, windows) | {"server_waited_s": stalls(log.read_text())}


async def _phases(
    config: Config, streams: Streams, model: str, pids: dict[str, int]
) -> tuple[Figures, dict[str, Window]]:
    """The streams alone, beside silent clients, alone again, beside reading ones."""
    started_s = time.perf_counter()
    await asyncio.sleep(config.calm)
    windows = {"alone": Window(started_s, time.perf_counter())}
    before, peak = _rss(pids), _rss(pids)
    body = long_request(model)
    silent_s = time.perf_counter()
    with SilentClients(streams.url, body, config.silent) as silent:
        while silent.open:
            if time.perf_counter() - silent_s > config.limit:
                raise MoeringError(f"{silent.open} silent clients are connected after {config.limit:g} s")
            peak = {id: max(peak[id], now) for id, now in _rss(pids).items()}
            silent.look()
            await asyncio.sleep(LOOK_S)
        cut_s = [at_s - silent_s for at_s in silent.cut_at_s]
    windows["silent"] = Window(silent_s, silent_s + min(cut_s))
    await asyncio.sleep(config.calm)
    after = _rss(pids)
    windows["reading"] = await _reading(streams, body, config.silent, min(cut_s))
    memory = {id: {"before": before[id], "peak": peak[id], "after": after[id]} for id in pids}
    return {"clients": config.silent, "stall_timeout_s": config.stall_timeout, "cut_ms": distribution(cut_s),
            "rss_bytes": memory}, windows  # fmt: skip


async def _reading(streams: Streams, body: dict[str, Any], count: int, length_s: float) -> Window:
    """The same requests from clients that read, for as long as no silent one was cut."""
    started_s = time.perf_counter()
    tasks = [asyncio.create_task(exchange(streams.session, streams.url, "chat", body)) for _ in range(count)]
    await asyncio.sleep(length_s)
    window = Window(started_s, time.perf_counter())
    failed = [t.result() for t in tasks if t.done() and t.result().error]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if failed:
        raise MoeringError(f"a reading client failed: {failed[0].error} {failed[0].detail}")
    return window


def long_request(model: str) -> dict[str, Any]:
    """Many tokens, and many bytes for each, so that the buffers on the way are soon full."""
    body = {"model": model, "messages": [{"role": "user", "content": "Tell me all about rings."}], "stream": True}
    return body | {"max_tokens": 4000, "ignore_eos": True, "logprobs": True, "top_logprobs": 20}


def stalls(log: str) -> list[float]:
    """How long the gateway waited for each client that it cut off, by its log."""
    return [float(s) for s in re.findall(r"a client read nothing for ([\d.]+) s", log)]


def _rss(pids: dict[str, int]) -> dict[str, int]:
    return {id: memory_of(pid).rss_bytes for id, pid in pids.items()}


def _latencies(streams: Streams, windows: dict[str, Window]) -> Figures:
    exchanges = [r.exchange for r in streams.recorded]
    if failed := [e for e in exchanges if e.error]:
        raise MoeringError(f"{len(failed)} streams failed: {failed[0].error} {failed[0].detail}")
    spans = [interval for e in exchanges for interval in intervals(e)]
    gaps = {name: within(spans, window) for name, window in windows.items()}
    return {"itl_ms": {name: distribution(g) for name, g in gaps.items()}, "ratio": ratios(spans, windows)}


def ratios(spans: list[Interval], windows: dict[str, Window]) -> dict[str, float]:
    """Quantiles of the latency beside silent clients by those beside reading ones."""
    silent, reading = (within(spans, windows[name]) for name in ("silent", "reading"))
    return {f"p{q}": round(quantile(silent, q / 100) / quantile(reading, q / 100), 3) for q in (50, 99)}


def table(figures: Figures) -> str:
    """The figures in markdown."""
    lines = ["| the streams | inter-token p50, ms | p99 | longest |", "|---|---|---|---|"]
    lines += [f"| {name} | {i['p50']} | {i['p99']} | {i['max']} |" for name, i in figures["itl_ms"].items()]
    ratio, cut, waited = figures["ratio"], figures["cut_ms"], figures["server_waited_s"]
    met = verdict(max(ratio.values()) <= LATENCY_BAR)
    lines.append(f"\nsilent by reading: p50 {ratio['p50']:.2f}, p99 {ratio['p99']:.2f}; bar {LATENCY_BAR}: {met}")
    bound_s = TOLERANCE * figures["stall_timeout_s"]
    all_cut = len(waited) == figures["clients"] and max(waited) <= bound_s
    lines.append(f"cut off after {cut['p50'] / 1e3:.1f} s (median), {cut['max'] / 1e3:.1f} s (last)")
    lines.append(f"without progress for at most {max(waited, default=0):.1f} s; bar {bound_s:g} s: {verdict(all_cut)}")
    for id, m in figures["rss_bytes"].items():
        line = f"{id}: RSS {m['before'] / MB:.0f} MB before, {m['peak'] / MB:.0f} at most, {m['after'] / MB:.0f} after"
        if id.startswith("gateway"):
            bar = MEMORY_BAR_BYTES * figures["clients"]
            line += f"; bar for the growth {bar / MB:.0f} MB: {verdict(m['peak'] - m['before'] <= bar)}"
        lines.append(line)
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_bench("silent_readers", Config, run, table, argv)


if __name__ == "__main__":
    sys.exit(main())
