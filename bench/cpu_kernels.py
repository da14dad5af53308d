"""One expert on a CPU, by rows and arithmetic: ``python -m bench.cpu_kernels``.

As many experts as outgrow the caches take turns, so that weights come from memory as they do while serving. All
arithmetics that this machine has take turns within a round, on one thread. Rate: bytes of fp16 weights per second;
beside it what a sum over the same memory reads.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from bench.command import Figures, run_bench
from kernels.expert_ffn import ExpertFFN
from kernels.linear import available_backends
from moering.config import option


@dataclass(frozen=True)
class Config:
    """Microseconds per expert."""

    hidden: int = option(576, "hidden size; the default model's")
    intermediate: int = option(768, "intermediate size")
    experts: int = option(100, "experts that take turns")
    rows: tuple[str, ...] = option(("1", "2", "4", "8", "16", "32", "64", "256"), "rows of an expert")
    rounds: int = option(7, "rounds, each with all arithmetics in turn")
    out: str = option("bench-cpu-kernels", "directory for cpu_kernels.json")


@torch.inference_mode()
async def run(config: Config) -> Figures:
    """All rows."""
    torch.set_num_threads(1)
    shape = config.intermediate, config.hidden
    weights = [[(torch.randn(shape) * 0.05).half() for _ in range(3)] for _ in range(config.experts)]
    experts = {
        name: [ExpertFFN(gate, up, down.T.contiguous(), name) for gate, up, down in weights]
        for name in available_backends()
    }
    floats = [torch.cat([w.flatten() for w in parts]).view(torch.float32) for parts in weights]
    cells = {}
    for rows in map(int, config.rows):
        x = torch.randn(rows, config.hidden)
        seconds: dict[str, list[float]] = {name: [] for name in ("a sum", *experts)}
        for _ in range(config.rounds):
            seconds["a sum"].append(_pass([t.sum for t in floats]))
            for name, mine in experts.items():
                seconds[name].append(_pass(mine, x))
        cells[rows] = {name: median(taken) * 1e6 for name, taken in seconds.items()}
    return {"bytes": 6 * config.hidden * config.intermediate, "rows": cells}


def _pass(calls: Sequence[Callable[..., object]], *arguments: torch.Tensor) -> float:
    """Seconds of one call, of all of these."""
    begun = time.perf_counter()
    for call in calls:
        call(*arguments)
    return (time.perf_counter() - begun) / len(calls)


def table(result: Figures) -> str:
    """µs and GB/s in markdown."""
    nbytes, names = result["bytes"], list(next(iter(result["rows"].values())))
    lines = [f"| rows | {' | '.join(f'{name}, µs (GB/s)' for name in names)} |", "|---" * (len(names) + 1) + "|"]
    for rows, cell in result["rows"].items():
        lines.append(f"| {rows} | {' | '.join(f'{us:.0f} ({nbytes / us / 1e3:.1f})' for us in cell.values())} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_bench("cpu_kernels", Config, run, table, argv)


if __name__ == "__main__":
    sys.exit(main())
