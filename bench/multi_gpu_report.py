"""The figures of `bench.multi_gpu` in markdown and as pictures; what is missing in them is named as not run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from bench.command import verdict

COST_BAR, COST_BAR_STREAMS = 0.05, 32
KILL_BAR_MS, STILL_BAR_MS, RELOAD_BAR = 50.0, 500.0, 0.10
ROUTERS_BAR = 1.8
VARIANTS = ("in process", "one micro-batch", "two micro-batches")
COLORS = ("#4477aa", "#ee6677", "#228833")
PRICE = ("attention", "copy_out", "send", "hop", "compute", "receive", "combine")
Figures = dict[str, Any]


def layers_of(checkpoint: Path) -> int:
    """Layers of a checkpoint."""
    return int(json.loads((checkpoint / "config.json").read_text())["num_hidden_layers"])


def table(figures: Figures) -> str:
    """All tables."""
    gpus = figures["gpus"]
    lines = [
        f"{len(gpus['names'])} times {gpus['names'][0]}, driver {gpus['driver']}; {figures['layers']} layers of 48"
    ]
    static = figures.get("static", {})
    sections = (
        ("static cost", _static(static)),
        ("price of a layer", _price(static.get("price", {}))),
        ("kills", _kills(figures)),
        ("several at once", _at_once(figures.get("at_once", {}))),
        ("standing still", _still(figures.get("still", {}))),
        ("reload", _reload(figures.get("reload", {}))),
        ("number of expert servers", _servers(figures)),
        ("a second router", _routers(figures)),
    )
    for name, rows in sections:
        lines += ["", f"**{name}**" + ("" if rows else ": not run"), *([""] if rows else []), *rows]
    lines += [f"FAILED {name}: {why}" for name, why in figures.get("failed", {}).items()]
    return "\n".join(lines)


def _static(static: Figures) -> list[str]:
    if not static.get("streams"):
        return []
    lines = ["| streams a GPU | " + " | ".join(f"{v}: tokens/s a GPU, ms a token" for v in VARIANTS) + " | cost |"]
    lines.append("|---" * (len(VARIANTS) + 2) + "|")
    for streams, row in sorted(static["streams"].items(), key=lambda item: int(item[0])):
        cells = [f"{row[v]['tokens_per_s_a_gpu']}, {row[v]['ms_a_token']}" for v in VARIANTS]
        costs = [f"{row[v]['cost']:.1%}" for v in VARIANTS[1:]]
        bar = ""
        if int(streams) >= COST_BAR_STREAMS:
            bar = f" (bar {COST_BAR:.0%}: {verdict(row[VARIANTS[2]]['cost'] <= COST_BAR)})"
        lines.append(f"| {streams} | {' | '.join(cells)} | {', '.join(costs)}{bar} |")
    equal = {n: f"{e['equal']} of {e['digests']}" for n, e in static.get("equal", {}).items()}
    return [*lines, "", f"digests equal to the first engine's: {equal}"]


def _price(price: Figures) -> list[str]:
    if not price:
        return []
    lines = ["| rows of a step | " + " | ".join(PRICE) + " | round trip |", "|---" * (len(PRICE) + 2) + "|"]
    for rows, us in sorted(price.items(), key=lambda item: int(item[0])):
        cells = [f"{us[name]:.0f}" if name in us else "-" for name in (*PRICE, "round_trip")]
        lines.append(f"| {rows} | {' | '.join(cells)} |")
    return [*lines, "", "µs, medians; *send* and *receive* are in *hop*."]


def _kills(figures: Figures) -> list[str]:
    runs = figures.get("kills", [])
    if not runs:
        return []
    gaps = [f["over_kill_ms"] for r in runs for f in r["faults"]]
    calm = max(r["between_faults"]["gap_ms"]["p99"] or 0.0 for r in runs)
    back = [f["redundant_ms"] for r in runs for f in r["faults"]]
    worst = max((g for g in gaps if g is not None), default=0.0)
    met = all(r["kept"] for r in runs) and worst <= KILL_BAR_MS + calm
    return [
        f"{len(gaps)} kills, {sum(r['hits'] for r in runs)} hit outstanding dispatches; {_sum(runs)}",
        f"gap over each kill, ms: {gaps}; p99 without one {calm:.0f}; bar {KILL_BAR_MS:g} + p99: {verdict(met)}",
        f"redundant again after, ms: {back}",
    ]


def _sum(runs: list[Figures]) -> str:
    names = runs[0]["account"]
    return ", ".join(f"{name.replace('_', ' ')} {sum(r['account'][name] for r in runs)}" for name in names)


def _at_once(runs: Figures) -> list[str]:
    if not runs:
        return []
    lines = [
        "| at once | account | longest gap, ms | tokens/s without, during | redundant again, ms |",
        "|---" * 5 + "|",
    ]
    for count, r in runs.items():
        rates = f"{r['between_faults']['tokens_per_s']}, {r['during_faults']['tokens_per_s']}"
        back = [f["redundant_ms"] for f in r["faults"]]
        lines.append(f"| {count} | {_sum([r])} | {r['during_faults']['gap_ms']['max']} | {rates} | {back} |")
    return lines


def _still(still: Figures) -> list[str]:
    if not still:
        return []
    calm = still["calm"]["p99"] or 0.0
    lines = [f"gaps without, ms: {still['calm']}; account {still['account']}"]
    for how in ("stopped", "hung"):
        for one in still[how]:
            gap = one["gap_ms"]["max"] or 0.0
            met = verdict(gap <= STILL_BAR_MS + calm and one["came_back"])
            back = "used again as it was" if one["came_back"] else "NOT as it was"
            lines.append(f"{how} {one['server']}: longest gap {gap:.0f} ms (bar 500 + p99: {met}), {back}")
    return [line if n == 0 else f"* {line}" for n, line in enumerate(lines)]


def _reload(r: Figures) -> list[str]:
    if not r:
        return []
    lines = [f"plain read of the same files, {r['readers']} threads: {r['plain_read_gb_per_s']} GB/s"]
    for name in ("start", "after_losses"):
        if f"{name}_gb_per_s" in r:
            lines.append(f"loading, {name.replace('_', ' ')}: {r[f'{name}_gb_per_s']} GB/s each")
    rates = r.get("tokens_per_s")
    if rates and rates["between_faults"]:
        cost = 1 - rates["during_faults"] / rates["between_faults"]
        lines.append(f"tokens/s {rates}: cost {cost:.1%} (bar {RELOAD_BAR:.0%}: {verdict(cost <= RELOAD_BAR)})")
    return lines


def _servers(figures: Figures) -> list[str]:
    runs = figures.get("servers", {})
    shared = "" if figures["apart"] else " (they share the GPUs for experts: this says nothing about speed)"
    return [f"expert servers: tokens/s {runs}{shared}"] if runs else []


def _routers(figures: Figures) -> list[str]:
    found = figures.get("routers", {})
    rates = found.get("tokens_per_s", {})
    if len(rates) < 2:
        return []
    gain = rates["2"] / rates["1"]
    apart = len(figures["gpus"]["names"]) > 3
    bar = f"bar {ROUTERS_BAR} where expert servers are not the limit: {verdict(gain >= ROUTERS_BAR)}"
    lines = [
        f"tokens/s {rates}: {gain:.2f} of one ({bar if apart else 'they share a GPU: this says nothing about speed'})"
    ]
    death = found.get("death")
    if death:
        gaps = [f["over_kill_ms"] for f in death["faults"]]
        lines.append(f"{len(gaps)} deaths of one of two: {_sum([death])}; gap over each, ms: {gaps}")
    return lines


def draw(figures: Figures, folder: Path) -> list[Path]:
    """Write the pictures of what was measured; returns their paths."""
    made = []
    streams = figures.get("static", {}).get("streams", {})
    if streams:
        made.append(_draw_static(streams, folder / "multi-gpu-static.png"))
    price = figures.get("static", {}).get("price", {})
    if price:
        made.append(_draw_price(price, folder / "multi-gpu-price.png"))
    return made


def _draw_static(streams: Figures, path: Path) -> Path:
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    keys = sorted(streams, key=int)
    for n, (variant, color) in enumerate(zip(VARIANTS, COLORS, strict=True)):
        at = [i + 0.27 * (n - 1) for i in range(len(keys))]
        axes.bar(at, [streams[k][variant]["tokens_per_s_a_gpu"] for k in keys], 0.25, color=color, label=variant)
    axes.set(xlabel="streams a GPU", ylabel="tokens/s a GPU", xticks=range(len(keys)), xticklabels=keys)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _draw_price(price: Figures, path: Path) -> Path:
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    keys = sorted(price, key=int)
    below = [0.0] * len(keys)
    for name in ("attention", "copy_out", "hop", "compute", "combine"):
        heights = [price[k].get(name, 0.0) for k in keys]
        axes.bar(keys, heights, 0.6, bottom=below, label=name.replace("_", " "))
        below = [a + b for a, b in zip(below, heights, strict=True)]
    axes.set(xlabel="rows of a step", ylabel="µs a layer", title="One micro-batch")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
