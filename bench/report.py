"""Figures of a load run, from what its clients recorded."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from bench.client import Exchange


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value with at least a share `q` of `values` at or below it (nearest rank); NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


def gaps(exchange: Exchange) -> list[float]:
    """Seconds between arrivals of output: what a reader waits for once the first token is there."""
    times = [a.at_s for a in exchange.arrivals]
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def distribution(seconds: Iterable[float]) -> dict[str, float | None]:
    """p50, p99 and maximum in milliseconds; None where nothing was measured."""
    values = list(seconds)
    figures = {"p50": quantile(values, 0.5), "p99": quantile(values, 0.99), "max": quantile(values, 1.0)}
    return {name: None if math.isnan(v) else round(v * 1e3, 3) for name, v in figures.items()}


def summarise(exchanges: Sequence[Exchange], wall_s: float) -> dict[str, Any]:
    """The figures of a run of `wall_s` seconds. Latencies are of requests that ended well; tokens count from all."""
    good = [e for e in exchanges if e.error is None]
    tokens = sum(e.output_tokens for e in exchanges)
    return {
        "requests": len(exchanges),
        "completed": len(good),
        "errors": dict(Counter(e.error for e in exchanges if e.error is not None)),
        "wall_s": round(wall_s, 3),
        "output_tokens": tokens,
        "tokens_per_s": round(tokens / wall_s, 2),
        "requests_per_s": round(len(good) / wall_s, 3),
        "ttft_ms": distribution(e.arrivals[0].at_s - e.started_s for e in good if e.arrivals),
        "itl_ms": distribution(gap for e in good for gap in gaps(e)),
        "e2e_ms": distribution(e.ended_s - e.started_s for e in good),
    }


def table(summary: dict[str, Any]) -> str:
    """The summary for a person."""
    errors = ", ".join(f"{n} of {kind}" for kind, n in sorted(summary["errors"].items())) or "none"
    lines = [
        f"requests       {summary['completed']} of {summary['requests']} completed, errors: {errors}",
        f"throughput     {summary['tokens_per_s']:.1f} tokens/s, {summary['requests_per_s']:.2f} requests/s "
        f"({summary['output_tokens']} tokens in {summary['wall_s']:.1f} s)",
        f"{'ms':<14} {'p50':>10} {'p99':>10} {'max':>10}",
    ]
    names = {"ttft_ms": "first token", "itl_ms": "inter-token", "e2e_ms": "end to end"}
    for key, name in names.items():
        cells = ("-" if v is None else f"{v:.1f}" for v in summary[key].values())
        lines.append(f"{name:<14} " + " ".join(f"{c:>10}" for c in cells))
    return "\n".join(lines)
