"""How fast experts are loaded, and what loading costs live traffic: ``python -m bench.loading --model default``.

First GB/s of our loading path beside plain sequential reads of the same files, in one run. Then, for each of
``--shares`` (flag `--load-share` of expert servers), a cluster under concurrent streams to which a server is added and
from which it is taken again, several times: tokens per second while experts are loaded against those of the calm time
just before. An added server loads at low priority in a process of its own; for one that is taken away, those that serve
load its share.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.client import Exchange, new_session
from bench.cluster import serving
from bench.command import Figures, checkpoint_path, run_bench, verdict
from bench.elastic import ElasticConfig, Step, perform
from bench.gaps import Window, intervals, tokens_per_s, within
from bench.load import first_model
from bench.loading_rates import rates, show_rates
from bench.report import distribution
from bench.streams import Streams, fixed_requests
from bench.workload import Lengths
from moering.config import option
from moering.errors import ConfigError

COST_BAR = 0.10


@dataclass(frozen=True)
class Config:
    """GB/s of loading, and tokens/s of live traffic with and without it."""

    model: str = option("default", "checkpoint directory, or 'default'")
    rounds: int = option(5, "times that everything is measured, in turn")
    threads: int = option(1, "threads of one product while GB/s are measured")
    shares: tuple[str, ...] = option(("0", "1"), "values of --load-share to compare; 'none': measure no traffic")
    expert_servers: int = option(3, "expert servers; one more is added and taken away")
    serve_flags: tuple[str, ...] = option((), "further flags of moering serve, separated by commas")
    streams: int = option(8, "concurrent streams")
    calm: float = option(8.0, "seconds without loading before each time with it")
    within: float = option(120.0, "seconds that adding or taking away a server may take")
    ready_timeout: float = option(600.0, "seconds within which a cluster must be ready")
    out: str = option("bench-loading", "directory for loading.json and the clusters' logs")

    def __post_init__(self) -> None:
        if min(self.rounds, self.threads, self.expert_servers, self.streams) < 1 or self.calm <= 0:
            raise ConfigError("rounds, threads, expert_servers, streams and calm must be positive")


async def run(config: Config) -> Figures:
    """Both parts; raises `MoeringError` when a cluster does not get ready or refuses an operation."""
    path = checkpoint_path(config.model)
    figures: Figures = {"rates": await asyncio.to_thread(rates, path, config.rounds, config.threads), "traffic": []}
    for share in config.shares if config.shares != ("none",) else ():
        figures["traffic"].append({"share": share, **await _traffic(config, path, share)})
    return figures


async def _traffic(config: Config, path: Path, share: str) -> dict[str, Any]:
    """The streams of one cluster, and what they got while experts were loaded."""
    n = config.expert_servers
    flags = ["--expert-servers", str(n), f"--expert-server-args=--load-share {share}", *config.serve_flags]
    log = Path(config.out, f"cluster-{share}.log")
    vocab_size = json.loads((path / "config.json").read_text())["vocab_size"]
    asked = ElasticConfig(calm=config.calm, within=config.within)
    async with serving(config.model, log, flags, config.ready_timeout) as url, new_session(config.within) as session:
        model = await first_model(session, url)
        bodies = fixed_requests(2 * config.streams, model, Lengths(16, 64), Lengths(100, 200), vocab_size, 0)
        await Streams(session, url, bodies, config.streams).once()  # first use of everything
        clients, stop = Streams(session, url, bodies, config.streams), asyncio.Event()
        streaming = asyncio.create_task(clients.until(stop))
        try:
            while not clients.flowing():
                await asyncio.sleep(0.01)
            steps = [
                await perform(session, url, f"scale={count}", asked)
                for _ in range(config.rounds)
                for count in (n + 1, n)
            ]
        finally:
            stop.set()
            await streaming
    return summary(steps, [r.exchange for r in clients.recorded])


def summary(steps: Sequence[Step], exchanges: Sequence[Exchange]) -> dict[str, Any]:
    """Per kind of loading: tokens/s of each time with it and of the calm before, what it cost, and the gaps."""
    spans = [i for e in exchanges for i in intervals(e)]
    rows = []
    for kind, chosen in (("a server joins", steps[::2]), ("those that serve load", steps[1::2])):
        calm = [Window(s.calm_from_s, s.start_s) for s in chosen]
        loading = [Window(s.start_s, s.end_s) for s in chosen]
        before, during = tokens_per_s(exchanges, calm), tokens_per_s(exchanges, loading)
        rows.append({
            "kind": kind, "seconds": [round(w.end_s - w.start_s, 1) for w in loading],
            "mb": [round(s.operation["moved_bytes"] / 1e6, 1) for s in chosen],
            "calm": [round(tokens_per_s(exchanges, [w]) or 0.0, 1) for w in calm],
            "loading": [round(tokens_per_s(exchanges, [w]) or 0.0, 1) for w in loading],
            "cost": round(1 - (during or 0.0) / before, 3) if before else None,
            "calm_gap_ms": distribution(g for w in calm for g in within(spans, w)),
            "loading_gap_ms": distribution(g for w in loading for g in within(spans, w)),
        })  # fmt: skip
    failed = sum(s.operation["phase"] != "done" for s in steps)
    return {"rows": rows, "errors": sum(e.error is not None for e in exchanges), "failed_operations": failed}


def table(figures: Figures) -> str:
    """The figures in markdown, with the bar of what loading may cost."""
    lines = show_rates(figures["rates"])
    head = "--load-share", "", "s", "MB", "tokens/s before", "with loading", "cost", "gap p99 before, ms", "with", "bar"
    if figures["traffic"]:
        lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for cluster in figures["traffic"]:
        for row in cluster["rows"]:
            met = row["cost"] is not None and row["cost"] <= COST_BAR
            middles = " | ".join(f"{median(row[name]):.1f}" for name in ("seconds", "mb", "calm", "loading"))
            gaps = f"{row['calm_gap_ms']['p99']} | {row['loading_gap_ms']['p99']}"
            cost = "-" if row["cost"] is None else f"{row['cost']:.1%}"
            lines.append(f"| {cluster['share']} | {row['kind']} | {middles} | {cost} | {gaps} | {verdict(met)} |")
    lines += [
        f"\nshare {c['share']}: {c['errors']} errors, {c['failed_operations']} failed operations"
        for c in figures["traffic"]
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_bench("loading", Config, run, table, argv)


if __name__ == "__main__":
    sys.exit(main())
