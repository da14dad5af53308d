"""Scaling and rolling restart under load: what clients notice of it.

``python -m bench.elastic --model default --steps scale=6,scale=3,restart --out results/`` keeps streams going, asks for
one operation after the other, and compares: every answer a 200 with all its tokens, the longest gap of each operation
against the p99 of the calm time before it, the bytes moved and the seconds taken.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp

from bench.client import new_session
from bench.cluster import found_or_started
from bench.command import Figures, run_bench, verdict
from bench.load import first_model
from bench.report import quantile
from bench.streams import Streams, fixed_requests
from bench.workload import Lengths
from moering.config import option
from moering.errors import ConfigError, MoeringError

GAP_BAR_S = 0.15
LOOK_S = 0.1


@dataclass(frozen=True)
class ElasticConfig:
    """Scales and restarts a cluster under concurrent streams and says what the clients noticed."""

    model: str = option("default", "model to serve: a checkpoint directory, or 'default'")
    url: str | None = option(None, "use this cluster instead of starting one")
    expert_servers: int = option(3, "expert servers to start")
    serve_flags: tuple[str, ...] = option((), "further flags of moering serve, separated by commas")
    ready_timeout: float = option(600.0, "seconds within which the started cluster must be ready")
    steps: tuple[str, ...] = option(("scale=6", "scale=3", "restart"), "in turn: scale=N, restart, restart=KIND")
    calm: float = option(8.0, "seconds without an operation before each one")
    within: float = option(600.0, "seconds that one operation may take")
    streams: int = option(4, "concurrent streams")
    requests: int = option(16, "distinct requests, repeated in turn")
    prompt_tokens: str = option("16-64", "prompt length, fixed or a range")
    output_tokens: str = option("100-200", "output length, fixed or a range")
    vocab_size: int | None = option(None, "prompt ids are below this; default: that of the checkpoint, or 2048")
    timeout: float = option(120.0, "seconds without a byte after which a request counts as failed")
    seed: int = option(0, "of prompts and sampling")
    out: str = option("bench-elastic", "directory for elastic.json and the cluster's log")

    def __post_init__(self) -> None:
        for step in self.steps:
            action, _, value = step.partition("=")
            if action not in ("scale", "restart") or (action == "scale" and not value.isdecimal()):
                raise ConfigError(f"steps: {step} is neither scale=N nor restart nor restart=KIND")

    def ids_below(self) -> int:
        """The bound of prompt ids."""
        path = Path(self.model, "config.json")
        if self.vocab_size or not path.is_file():
            return self.vocab_size or 2048
        return int(json.loads(path.read_text())["vocab_size"])


@dataclass(frozen=True)
class Step:
    """One operation: when it was under way, and what the cluster says of it. Times are of `time.perf_counter`."""

    name: str
    calm_from_s: float
    start_s: float
    end_s: float
    operation: dict[str, Any]


async def run(config: ElasticConfig) -> Figures:
    """All steps on a cluster started for it, or the one at `config.url`."""
    flags = ["--expert-servers", str(config.expert_servers), *config.serve_flags]
    log = Path(config.out, "cluster.log")
    cluster = found_or_started(config.url, config.model, log, flags, config.ready_timeout)
    async with cluster as url, new_session(config.timeout) as session:
        lengths = Lengths.parse(config.prompt_tokens), Lengths.parse(config.output_tokens)
        model = await first_model(session, url)
        bodies = fixed_requests(config.requests, model, *lengths, config.ids_below(), config.seed)
        await Streams(session, url, bodies[: config.streams], config.streams).once()  # first use of everything
        reference = Streams(session, url, bodies, config.streams)
        await reference.once()
        wrong = [r.exchange for r in reference.recorded if r.exchange.error]
        if wrong:
            raise MoeringError(f"a request fails without any operation: {wrong[0].error} {wrong[0].detail}")
        clients, stop = Streams(session, url, bodies, config.streams), asyncio.Event()
        streaming = asyncio.create_task(clients.until(stop))
        try:
            steps = [await perform(session, url, step, config) for step in config.steps]
        finally:
            stop.set()
            await streaming
    tokens = {r.request: r.exchange.token_ids for r in reference.recorded}
    return report(steps, clients, tokens)


async def perform(session: aiohttp.ClientSession, url: str, step: str, config: ElasticConfig) -> Step:
    """Stay calm for a while, then ask for one operation and wait for its end."""
    calm_from_s = time.perf_counter()
    await asyncio.sleep(config.calm)
    action, _, value = step.partition("=")
    body: dict[str, Any] = {"count": int(value)} if action == "scale" else {"kind": value}
    start_s = time.perf_counter()
    async with session.post(f"{url}/admin/{action}", json=body) as response:
        operation = await response.json()
        if response.status != 202:
            raise MoeringError(f"{step}: {response.status} {operation}")
    print(f"{step}: {operation['id']}", file=sys.stderr)
    while operation["phase"] not in ("done", "failed"):
        if time.perf_counter() - start_s > config.within:
            raise MoeringError(f"{step} has not ended within {config.within:g} s: {operation}")
        await asyncio.sleep(LOOK_S)
        async with session.get(f"{url}/admin/operations/{operation['id']}") as response:
            operation = await response.json() if response.status == 200 else operation
    return Step(step, calm_from_s, start_s, time.perf_counter(), operation)


def report(steps: Sequence[Step], clients: Streams, reference: dict[int, list[int]]) -> Figures:
    """The figures, and whether the bars were met."""
    exchanges = [r.exchange for r in clients.recorded]
    failed = [f"{e.error}: {e.detail}" for e in exchanges if e.error]
    changed = sum(r.exchange.token_ids != reference[r.request] for r in clients.recorded if not r.exchange.error)
    spans = [(a.at_s, b.at_s) for e in exchanges for a, b in pairwise(e.arrivals)]
    rows = []
    for step in steps:
        calm = [b - a for a, b in spans if step.calm_from_s <= a and b < step.start_s]
        during = [b - a for a, b in spans if b >= step.start_s and a <= step.end_s]
        p99_s, longest_s = quantile(calm, 0.99), max(during, default=float("nan"))
        rows.append({
            "step": step.name, "phase": step.operation["phase"], "error": step.operation["error"],
            "seconds": round(step.end_s - step.start_s, 2), "moved_bytes": step.operation["moved_bytes"],
            "calm_p99_ms": round(p99_s * 1e3, 1), "calm_longest_ms": round(max(calm, default=float("nan")) * 1e3, 1),
            "longest_gap_ms": round(longest_s * 1e3, 1),
            "met": step.operation["phase"] == "done" and longest_s <= p99_s + GAP_BAR_S,
        })  # fmt: skip
    return {
        "requests": len(exchanges), "failed": failed, "changed": changed, "steps": rows,
        "kept": not failed and not changed and all(row["phase"] == "done" for row in rows),
    }  # fmt: skip


def show(figures: Figures) -> str:
    """For a person."""
    lines = [
        f"{figures['requests']} requests, {len(figures['failed'])} failed, {figures['changed']} with other tokens: "
        f"{verdict(figures['kept'])}",
        "| operation | phase | s | MB moved | p99 gap before, ms | longest gap, ms | bar p99 + 150 ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in figures["steps"]:
        lines.append(
            f"| {row['step']} | {row['phase']} | {row['seconds']:.1f} | {row['moved_bytes'] / 1e6:.1f} | "
            f"{row['calm_p99_ms']:.1f} | {row['longest_gap_ms']:.1f} | {verdict(row['met'])} |"
        )
    return "\n".join([*lines, *figures["failed"][:5]])


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_bench("elastic", ElasticConfig, run, show, argv)


if __name__ == "__main__":
    sys.exit(main())
