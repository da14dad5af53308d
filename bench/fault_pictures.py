"""Pictures of a fault run: the longest gap per fault, and the arrivals of every stream around the worst one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from bench.fault_report import Run
from bench.gaps import Window, intervals, tokens_per_s, within

BEFORE_S, AFTER_S = 0.5, 1.5
RATES_BEFORE_S, RATES_AFTER_S, BIN_S = 4.0, 16.0, 0.5


def draw(run: Run, folder: Path) -> list[Path]:
    """Write the pictures into `folder` and return their paths; none for a run without a fault."""
    if not run.episodes:
        return []
    return [_gaps(run, folder / "gaps.png"), _timeline(run, folder / "timeline.png")]


def _longest_ms(run: Run, window: Window) -> float:
    return 1e3 * max(within(run.spans(intervals), window), default=0.0)


def _gaps(run: Run, path: Path) -> Path:
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    heights = [_longest_ms(run, window) for window in run.windows]
    numbers = range(1, len(heights) + 1)
    axes.bar(numbers, heights, color="#4477aa", label="longest gap, kill to full redundancy")
    calm_ms = 1e3 * max(run.calm_gaps(), default=0.0)
    axes.axhline(calm_ms, color="#228833", label=f"longest gap between faults ({calm_ms:.0f} ms)")
    axes.axhline(calm_ms + 150, color="#ee6677", linestyle="--", label="150 ms more")
    axes.set(xlabel="fault", ylabel="ms", title="Longest gap of any stream", xticks=list(numbers))
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _timeline(run: Run, path: Path) -> Path:
    """One line per stream around the fault with the longest gap, a mark per arrival."""
    worst = max(range(len(run.windows)), key=lambda i: _longest_ms(run, run.windows[i]))
    episode, window = run.episodes[worst], run.windows[worst]
    shown = Window(episode.start_s - BEFORE_S, min(window.end_s, episode.start_s + AFTER_S))
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    for recorded in run.observed:
        times = [a.at_s - episode.start_s for a in recorded.exchange.arrivals if shown.holds(a.at_s)]
        axes.plot(times, [recorded.stream] * len(times), "|", color="#4477aa", markersize=10)
    for killed in episode.killed:
        axes.axvline(killed.at_s - episode.start_s, color="#ee6677")
    names = ", ".join(k.process.id for k in episode.killed)
    axes.set(xlabel="seconds since the kill", ylabel="stream", title=f"Tokens around fault {worst + 1} ({names})")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def draw_cases(runs: Sequence[tuple[str, Run]], folder: Path) -> None:
    """Write faults-timeline.png and faults-gaps.png of the fault matrix, given the name and the run of each case."""
    with_faults = [(name, run) for name, run in runs if run.episodes]
    if with_faults:
        _rates(with_faults, folder / "faults-timeline.png")
        _gaps_of_cases(runs, folder / "faults-gaps.png")


def _rates(runs: Sequence[tuple[str, Run]], path: Path) -> None:
    """Tokens/s around the kill, one panel per case, one line per fault."""
    figure, panels = plt.subplots(
        len(runs), 1, figsize=(9, 1.5 * len(runs) + 0.6), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    edges = [i * BIN_S for i in range(round(-RATES_BEFORE_S / BIN_S), round(RATES_AFTER_S / BIN_S) + 1)]
    for (name, run), axes in zip(runs, panels[:, 0], strict=True):
        for episode in run.episodes:
            bins = [Window(episode.start_s + a, episode.start_s + b) for a, b in itertools.pairwise(edges)]
            rates = [tokens_per_s(run.exchanges, [b]) if b.end_s <= run.ended_s else math.nan for b in bins]
            axes.stairs(rates, edges, color="#4477aa", alpha=0.7, baseline=None)
            if episode.redundant_s is not None:
                axes.axvline(episode.redundant_s, color="#228833", linestyle=":")
        for kill in run.episodes[0].killed:
            axes.axvline(kill.at_s - run.episodes[0].start_s, color="#ee6677")
        axes.set(ylabel="tokens/s", xlim=(edges[0], edges[-1]), ylim=(0, None))
        axes.set_title(f"dead: {name}", fontsize="small", loc="left")
    panels[-1, 0].set_xlabel("seconds since the kill (red); dotted: full redundancy of each fault")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _gaps_of_cases(runs: Sequence[tuple[str, Run]], path: Path) -> None:
    """One mark for the longest gap of each stream in each fault, and the longest gap without one of each case."""
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    for place, (_, run) in enumerate(runs):
        by_stream = [1e3 * gap for gap in run.longest_by_stream()]
        axes.plot([place] * len(by_stream), by_stream, "_", color="#4477aa", markersize=14)
        axes.plot(place, 1e3 * max(run.calm_gaps(), default=0.0), "v", color="#228833")
    axes.plot([], [], "_", color="#4477aa", label="longest gap of a stream in a fault")
    axes.plot([], [], "v", color="#228833", label="longest gap without a fault")
    axes.set(ylabel="ms", yscale="log", xlabel="expert servers dead", title="Longest gap of each stream in each fault")
    axes.set_xticks(range(len(runs)), [name for name, _ in runs])
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
