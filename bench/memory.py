"""Memory of each process of a cluster against the bytes of its experts: ``python -m bench.memory --model default``.

Measured when every expert has all its replicas and again after a load. That the router holds no expert shows in what it
has read in its whole life: less than all weights but the experts' and what a Python process reads besides.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.client import new_session
from bench.cluster import serving
from bench.command import Figures, checkpoint_path, run_bench, verdict
from bench.load import first_model
from bench.process_memory import MB, bytes_read_by, memory_of
from bench.streams import Streams, fixed_requests
from bench.workload import Lengths
from moering.checkpoint import Checkpoint
from moering.config import option
from moering.status import fetch

FACTOR, ALLOWANCE_BYTES = 1.2, 400 * MB
PYTHON_READS_BYTES = 150 * MB
"""Modules of torch and the like. Libraries are mapped, which is not counted as reading."""


@dataclass(frozen=True)
class Config:
    """Memory of each process against the bytes of its experts."""

    model: str = option("default", "checkpoint directory, or 'default'")
    serve_flags: tuple[str, ...] = option((), "flags of moering serve, separated by commas")
    ready_timeout: float = option(600.0, "seconds within which the cluster must be ready")
    streams: int = option(8, "concurrent streams of the load")
    output_tokens: int = option(64, "tokens of each of them")
    vocab_size: int = option(259, "prompt ids are below this")
    timeout: float = option(120.0, "seconds without a byte after which a request counts as failed")
    out: str = option("bench-memory", "directory for memory.json and the cluster's log")


@dataclass(frozen=True)
class Sizes:
    """Bytes in the checkpoint's files: of one expert, of all experts, and of the rest."""

    expert: int
    experts: int
    rest: int

    @classmethod
    def of(cls, path: Path) -> Sizes:
        """Read the headers of a checkpoint."""
        checkpoint = Checkpoint(path)
        try:
            experts = checkpoint.num_layers * checkpoint.num_experts * checkpoint.expert_bytes
        finally:
            checkpoint.close()
        total = sum(f.stat().st_size for f in path.glob("*.safetensors"))
        return cls(checkpoint.expert_bytes, experts, total - experts)


async def run(config: Config) -> Figures:
    """Measure, load, measure."""
    path = checkpoint_path(config.model)
    sizes = Sizes.of(path)
    cluster = serving(config.model, Path(config.out, "cluster.log"), config.serve_flags, config.ready_timeout)
    async with cluster as url, new_session(config.timeout) as session:
        when_ready = await asyncio.to_thread(_look, url, sizes)
        model = await first_model(session, url)
        lengths = Lengths(16, 64), Lengths(config.output_tokens, config.output_tokens)
        bodies = fixed_requests(config.streams, model, *lengths, config.vocab_size, 0)
        await Streams(session, url, bodies, config.streams).once()
        after_load = await asyncio.to_thread(_look, url, sizes)
    return {"experts_bytes": sizes.experts, "rest_bytes": sizes.rest, "ready": when_ready, "after_load": after_load}


def _look(url: str, sizes: Sizes) -> list[dict[str, Any]]:
    rows = []
    for p in fetch(url)["processes"]:
        memory = memory_of(p["pid"])
        row = {"id": p["id"], "kind": p["kind"], "rss_bytes": memory.rss_bytes, "anon_bytes": memory.anon_bytes}
        row |= {"peak_bytes": memory.peak_bytes, "read_bytes": bytes_read_by(p["pid"]), "experts": p["experts"]}
        rows.append(row | judge(row, sizes))
    return rows


def judge(row: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    """The bar of a process and whether it is met; empty for kinds without one."""
    if row["kind"] == "expert-server":
        bar = int(FACTOR * row["experts"] * sizes.expert + ALLOWANCE_BYTES)
        return {"bar_on": "rss_bytes", "bar_bytes": bar, "met": row["rss_bytes"] <= bar}
    if row["kind"] == "router":  # where all experts are less than the bar itself, meeting it would show nothing
        bar = sizes.rest + PYTHON_READS_BYTES
        return {"bar_on": "read_bytes", "bar_bytes": bar, "met": row["read_bytes"] <= bar < sizes.experts}
    return {}


def table(figures: Figures) -> str:
    """The figures in markdown, in MB."""
    experts, rest = figures["experts_bytes"] / MB, figures["rest_bytes"] / MB
    lines = [f"checkpoint: experts {experts:.0f} MB, all else {rest:.0f} MB (MB: 10^6 bytes)"]
    for name in ("ready", "after_load"):
        lines += ["", f"{name.replace('_', ' ')}:", ""]
        lines += ["| process | experts | RSS | anonymous | peak RSS | read so far | bar |", "|---" * 7 + "|"]
        lines += [_line(row) for row in figures[name]]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    cells = [f"{row[name] / MB:.0f}" for name in ("rss_bytes", "anon_bytes", "peak_bytes", "read_bytes")]
    bar = "-"
    if "met" in row:
        bar = f"{row['bar_on'].removesuffix('_bytes')} ≤ {row['bar_bytes'] / MB:.0f}: {verdict(row['met'])}"
    return f"| {row['id']} | {row['experts']} | {' | '.join(cells)} | {bar} |"


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_bench("memory", Config, run, table, argv)


if __name__ == "__main__":
    sys.exit(main())
