"""How long a warm start takes: ``python -m bench.startup --model default --times 5``.

The time from starting ``moering serve`` (its packages installed, the checkpoint built) until the first token of a chat,
with a new cluster each time.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.client import exchange, new_session
from bench.cluster import serving
from bench.command import Figures, checkpoint_path, run_bench, verdict
from bench.load import first_model
from moering.config import option
from moering.errors import ConfigError, MoeringError

BAR_S = 15.0


@dataclass(frozen=True)
class Config:
    """From starting `moering serve` to the first token of a chat."""

    model: str = option("default", "checkpoint directory, or 'default'")
    serve_flags: tuple[str, ...] = option((), "flags of moering serve, separated by commas")
    times: int = option(5, "starts, one after another")
    timeout: float = option(600.0, "seconds within which a cluster must be ready, and answer")
    out: str = option("bench-startup", "directory for startup.json and the cluster's log")

    def __post_init__(self) -> None:
        if self.times < 1:
            raise ConfigError("times must be positive")


async def run(config: Config) -> Figures:
    """Start and stop clusters; raises `MoeringError` when one does not answer."""
    checkpoint_path(config.model)  # built now, where it is missing: that is not part of a warm start
    starts = [await _start(config) for _ in range(config.times)]
    return {"starts": starts, "bar_s": BAR_S}


async def _start(config: Config) -> dict[str, float]:
    started_s = time.perf_counter()
    cluster = serving(
        config.model, Path(config.out, "cluster.log"), config.serve_flags, config.timeout, replicated=False
    )
    async with cluster as url, new_session(config.timeout) as session:
        ready_s = time.perf_counter() - started_s
        model = await first_model(session, url)
        body = {"model": model, "messages": [{"role": "user", "content": "What is a ring?"}], "max_tokens": 4}
        answer = await exchange(session, url, "chat", body | {"stream": True, "ignore_eos": True})
        if answer.error or not answer.arrivals:
            raise MoeringError(f"the chat failed: {answer.error} {answer.detail}")
        return {"ready_s": round(ready_s, 2), "first_token_s": round(answer.arrivals[0].at_s - started_s, 2)}


def table(figures: Figures) -> str:
    """The figures in markdown."""
    lines = ["| start | /ready, s | first token, s |", "|---|---|---|"]
    lines += [f"| {n} | {s['ready_s']:.1f} | {s['first_token_s']:.1f} |" for n, s in enumerate(figures["starts"], 1)]
    firsts = [s["first_token_s"] for s in figures["starts"]]
    met = verdict(max(firsts) <= figures["bar_s"])
    lines.append(f"\nmedian {median(firsts):.1f} s, longest {max(firsts):.1f} s; bar {figures['bar_s']:g} s: {met}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_bench("startup", Config, run, table, argv)


if __name__ == "__main__":
    sys.exit(main())
