"""Pictures of a fault run: the longest gap per fault, and the arrivals of every stream around the worst one."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from bench.fault_report import Run
from bench.gaps import Window, intervals, within

BEFORE_S, AFTER_S = 0.5, 1.5


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
