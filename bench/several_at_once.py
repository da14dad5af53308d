"""Several expert servers killed at once: ``python -m bench.several_at_once --model default --at-once 1,2,4``.

For each number k the fault bench (`bench.faults`) runs on one cluster: k servers get SIGKILL at the same moment under
concurrent streams, several times, and every stream is held against the same request without a failure.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from bench.cluster import serving
from bench.command import Figures, run_bench
from bench.fault_report import report
from bench.faults import FaultConfig
from bench.faults import run as run_faults
from moering.config import option
from moering.errors import ConfigError


@dataclass(frozen=True)
class Config:
    """Gaps and recovery for k expert servers killed at once."""

    model: str = option("default", "model to serve: a checkpoint directory, or 'default'")
    url: str | None = option(None, "use this cluster of this machine instead of starting one")
    expert_servers: int = option(8, "expert servers to start")
    replication: int = option(2, "replicas of each expert, also of a cluster given by its URL")
    at_once: tuple[str, ...] = option(("1", "2", "4"), "how many to kill at once, separated by commas")
    times: int = option(3, "faults for each number")
    streams: int = option(8, "concurrent streams")
    output_tokens: str = option("200-300", "output length, fixed or a range")
    calm: float = option(4.0, "seconds without a fault before each one")
    restore_timeout: float = option(120.0, "seconds within which the cluster must be as before")
    ready_timeout: float = option(600.0, "seconds within which the started cluster must be ready")
    seed: int = option(0, "of prompts, sampling, victims and moments")
    out: str = option("bench-several-at-once", "directory for several_at_once.json and the cluster's log")

    def __post_init__(self) -> None:
        if not self.numbers or min(self.numbers) < 1 or max(self.numbers) > self.expert_servers:
            raise ConfigError(f"at_once: numbers from 1 to {self.expert_servers} (--expert-servers)")

    @property
    def numbers(self) -> list[int]:
        """`at_once` as numbers."""
        try:
            return [int(k) for k in self.at_once]
        except ValueError as e:
            raise ConfigError(f"at_once: {e}") from e

    def faults(self, url: str, k: int) -> FaultConfig:
        """The fault bench with k victims."""
        base = FaultConfig(model=self.model, url=url, replication=self.replication, times=self.times, seed=self.seed)
        return replace(
            base, kill=("expert-server",) * k, streams=self.streams, output_tokens=self.output_tokens, calm=self.calm,
            restore_timeout=self.restore_timeout, requests=max(base.requests, self.streams),
        )  # fmt: skip


async def run(config: Config) -> Figures:
    """All numbers on one cluster; a process that keeps dying is started again without a delay."""
    if config.url is not None:
        return await _all(config, config.url)
    size = ["--expert-servers", str(config.expert_servers), "--replication", str(config.replication)]
    log = Path(config.out, "cluster.log")
    async with serving(config.model, log, [*size, "--max-restart-delay-s", "0"], config.ready_timeout) as url:
        return await _all(config, url)


async def _all(config: Config, url: str) -> Figures:
    runs = {}
    for k in config.numbers:
        print(f"{k} of {config.expert_servers} at once", file=sys.stderr)
        runs[str(k)] = report(await run_faults(config.faults(url, k)))
    return {"runs": runs}


def table(figures: Figures) -> str:
    """The figures in markdown: gaps in ms while recovery lasts, recovery in s from the kill to full redundancy."""
    lines = [
        "| at once | faults | streams | errors | lost, duplicated, changed | rows lost / resent "
        "| gap p50 | p99 | max | max without a fault | recovery, median (worst) |",
        "|---" * 11 + "|",
        *(f"| {k} | {_row(run)} |" for k, run in figures["runs"].items()),
    ]
    return "\n".join(lines)


def _row(run: dict[str, Any]) -> str:
    counts, gap, counters = run["account"], run["during_faults"]["gap_ms"], run["counters"]
    wrong = sum(counts[n] for n in ("lost", "duplicated", "changed", "changed_digests", "missing_digests"))
    redundant = [f["redundant_ms"] for f in run["faults"]]
    recovered = [r / 1e3 for r in redundant if r is not None]
    recovery = f"{median(recovered):.1f} ({max(recovered):.1f})" if len(recovered) == len(redundant) > 0 else "NOT"
    rows = f"{counters.get('rows_lost', '-')} / {counters.get('rows_resent', '-')}"
    cells = [len(run["faults"]), counts["requests"], counts["errors"], wrong, rows, gap["p50"], gap["p99"], gap["max"]]
    return " | ".join("-" if c is None else str(c) for c in [*cells, run["between_faults"]["gap_ms"]["max"], recovery])


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_bench("several_at_once", Config, run, table, argv)


if __name__ == "__main__":
    sys.exit(main())
