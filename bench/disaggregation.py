"""The price of disaggregation: tokens/s of a cluster against the same engine with its experts in one process.

``python -m bench.disaggregation --model default --rounds 4``. Both are driven over the gateways' protocol, without
HTTP, in turn, so that a machine whose speed drifts does not favour one. The ratio of each round is of that round's
figures; the in-process engine is taken at its best number of threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cluster import serving
from bench.command import checkpoint_path
from bench.engine_client import EngineClient, router_address
from bench.engine_processes import Place, in_process
from moering.config import option, parse
from moering.errors import ConfigError, MoeringError


@dataclass(frozen=True)
class Config:
    """Tokens/s of a cluster against the same engine with its experts in its own process."""

    model: str = option("default", "checkpoint directory, or 'default'")
    streams: tuple[str, ...] = option(("1", "8", "16", "32"), "numbers of concurrent streams, separated by commas")
    rounds: int = option(4, "rounds, each with all variants in turn")
    tokens: int = option(48, "tokens of each stream")
    threads: tuple[str, ...] = option(("1", "2"), "thread counts of the in-process engine")
    serve_flags: tuple[str, ...] = option((), "flags of moering serve, separated by commas")
    json: str = option("", "file for the figures")


def tokens_per_s(client: EngineClient, streams: int, tokens: int) -> float:
    """Decode speed of `streams` equal requests: tokens after the first of each, by the time since then."""
    client.ask([[1, 4, 100 + i, *range(200, 216)] for i in range(streams)], tokens)
    got, ended, started_s = 0, 0, 0.0
    first: set[int] = set()
    while ended < streams:
        for index, t in client.answers():
            got += len(first) == streams
            first.add(index)
            ended += t.finish_reason is not None
        if len(first) == streams and not started_s:
            started_s, got = time.perf_counter(), 0
    return got / (time.perf_counter() - started_s)


async def run(config: Config) -> dict[str, Any]:
    """All rounds; tokens/s by variant and number of streams."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        async with serving(config.model, directory / "cluster.log", config.serve_flags, 600.0) as url:
            router, place = await router_address(url), Place(checkpoint_path(config.model), "cpu")
            with contextlib.ExitStack() as stack:
                addresses = {"cluster": router}
                for n in config.threads:
                    engine = in_process(place, ["--threads", n], directory / f"in-process-{n}.log")
                    addresses[f"in process, {n} threads"] = stack.enter_context(engine)
                clients = {variant: EngineClient(address) for variant, address in addresses.items()}
                return await asyncio.to_thread(_rounds, config, clients)


def _rounds(config: Config, clients: dict[str, EngineClient]) -> dict[str, Any]:
    streams = [int(n) for n in config.streams]
    for client in clients.values():  # warm up
        tokens_per_s(client, 2, 8)
    figures: dict[str, dict[int, list[float]]] = {v: {n: [] for n in streams} for v in clients}
    for r in range(config.rounds):
        for n in streams:
            for variant, client in clients.items():
                figures[variant][n].append(tokens_per_s(client, n, config.tokens))
        print(f"round {r + 1} of {config.rounds}", file=sys.stderr)
    return {"tokens_per_s": figures, "ratio": {n: _ratio(figures, n) for n in streams}}


def _ratio(figures: dict[str, dict[int, list[float]]], streams: int) -> dict[str, float]:
    local = {v: f[streams] for v, f in figures.items() if v != "cluster"}
    best = max(local.values(), key=statistics.median)
    ratios = [c / b for c, b in zip(figures["cluster"][streams], best, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def table(result: dict[str, Any]) -> str:
    """The figures in markdown."""
    figures = result["tokens_per_s"]
    lines = ["| streams | " + " | ".join(figures) + " | ratio to the best, median (min-max) |"]
    lines.append("|---" * (len(figures) + 2) + "|")
    for n, ratio in result["ratio"].items():
        speeds = " | ".join(f"{statistics.median(f[n]):.1f}" for f in figures.values())
        lines.append(f"| {n} | {speeds} | {ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f}) |")
    return "\n".join(lines)


def main() -> int:
    """Entry point."""
    try:
        config = parse(Config, sys.argv[1:], prog="bench.disaggregation")
        result = asyncio.run(run(config))
    except (MoeringError, ConfigError) as e:
        print(f"bench.disaggregation: {e}", file=sys.stderr)
        return 1
    print(table(result))
    if config.json:
        Path(config.json).write_text(json.dumps({"config": dataclasses.asdict(config), **result}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
