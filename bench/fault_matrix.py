"""``python -m bench.faults --matrix``: 0, 1, 2, 4, … and all expert servers dead at once, on one cluster.

Every case sends the same requests and is held against the same reference. Two more cases: a second death during the
recovery from the first, and requests that ask for `renormalize` instead of waiting.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from bench.episodes import Episode
from bench.fault_page import page
from bench.fault_pictures import draw_cases
from bench.fault_report import Run, account, only_resent
from bench.fault_run import FaultConfig, faulted, prepared
from bench.gaps import Window, intervals, tokens_per_s, within
from bench.report import distribution
from moering.errors import MoeringError

STAGGER_S = 3.0  # the first server is down, or loads, when the second one dies
# Caught up: the first moment after which this many seconds bring nine tenths of the tokens from before the kill.
CATCH_UP_S, CATCH_UP_SHARE, CATCH_UP_STEP_S = 2.0, 0.9, 0.1
Figures = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What dies, and what the requests ask for when an expert has no replica."""

    name: str
    dead: int
    stagger_s: float = 0.0
    policy: str = "wait"

    def config(self, base: FaultConfig) -> FaultConfig:
        """Without deaths the streams run for as long as the calm times of a case with them."""
        if not self.dead:
            return replace(base, times=0, calm=base.calm * (base.faults + 1))
        kill = ("expert-server",) * self.dead
        return replace(base, times=base.faults, kill=kill, stagger=self.stagger_s, on_missing_expert=self.policy)


def cases(config: FaultConfig) -> list[Case]:
    """In the order in which they run."""
    found = [Case(str(k), k) for k in config.numbers]
    if max(config.numbers) > 1:
        found.append(Case(f"2, {STAGGER_S:.0f} s apart", 2, stagger_s=STAGGER_S))
    losing = [k for k in config.numbers if config.replication <= k < config.servers]
    if losing:
        found.append(Case(f"{max(losing)}, renormalize", max(losing), policy="renormalize"))
    return found


def write(config: FaultConfig) -> int:
    """Run all cases and write the page, its pictures and faults.json. Returns the exit status: 0 if all was kept."""
    load = os.getloadavg()[0]
    measured, problem = uvloop.run(_all(config))
    result: Figures = {
        "config": dataclasses.asdict(config),
        "servers": config.servers,
        "times": config.faults,
        "load": round(load, 2),
    }
    result |= {"problem": problem, "cases": [figures(case, run, config.calm) for case, run in measured]}
    Path(config.out, "faults.json").write_text(json.dumps(result, indent=1) + "\n")
    docs = Path(config.docs)
    (docs / "pictures").mkdir(parents=True, exist_ok=True)
    draw_cases([(case.name, run) for case, run in measured], docs / "pictures")
    text = page(result)
    (docs / "faults.md").write_text(text)
    print(text)
    return int(bool(problem) or not all(c["kept"] for c in result["cases"] if c["policy"] == "wait"))


async def _all(config: FaultConfig) -> tuple[list[tuple[Case, Run]], str]:
    """The cases that ran, and what ended the run before its end."""
    measured: list[tuple[Case, Run]] = []
    async with prepared(config) as cluster:
        for case in cases(config):
            print(f"{case.name} of {config.servers} dead", file=sys.stderr)
            try:
                measured.append((case, await faulted(cluster, case.config(config))))
            except (MoeringError, aiohttp.ClientError, TimeoutError) as e:
                return measured, f"{case.name} dead: {type(e).__name__} {e}"
    return measured, ""


def figures(case: Case, run: Run, around_s: float) -> Figures:
    """The figures of a case, ready for JSON. Throughput before and after: of `around_s` seconds each."""
    counts = account(run)
    before = [Window(e.start_s - around_s, e.start_s) for e in run.episodes]
    after = [Window(w.end_s, w.end_s + around_s) for w in run.windows]
    if not run.episodes:
        before = [Window(run.started_s, run.ended_s)]
    over = all(e.over for e in run.episodes)
    return {
        "name": case.name, "dead": case.dead, "policy": case.policy,
        "kept": counts.clean and only_resent(run.counters) and over, "over": over,
        "account": dataclasses.asdict(counts), "counters": dict(run.counters),
        "tokens_per_s": {
            "before": tokens_per_s(run.exchanges, before),
            "during": tokens_per_s(run.exchanges, run.windows),
            "after": tokens_per_s(run.exchanges, after),
        },
        "calm_gap_ms": distribution(run.calm_gaps()),
        "gap_ms": distribution(g for w in run.windows for g in within(run.spans(intervals), w)),
        "next_token_ms": distribution(s for e in run.episodes for s in next_tokens(run, e.start_s)),
        "longest_ms": _longest(run),
        "faults": [_times(run, e, around_s) for e in run.episodes],
    }  # fmt: skip


def next_tokens(run: Run, at_s: float) -> Iterator[float]:
    """Seconds from `at_s` to the next token of each stream that was in the middle of an answer then."""
    for exchange in run.exchanges:
        times = [a.at_s for a in exchange.arrivals]
        if times and times[0] <= at_s < times[-1]:
            yield next(t for t in times if t > at_s) - at_s


def longest_gaps(run: Run) -> tuple[list[float], list[float]]:
    """Of each stream in each fault its longest gap: of those affected by the fault, and of the others.

    Affected: longer than the longest gap of any stream in the same run outside of all faults.
    """
    calm_s = max(run.calm_gaps(), default=0.0)
    found = run.longest_by_stream()
    return [g for g in found if g > calm_s], [g for g in found if g <= calm_s]


def caught_up_s(run: Run, start_s: float, end_s: float, before: float) -> float | None:
    """Seconds from `start_s` until tokens come nearly as fast as `before` again; None if not until `end_s`."""
    for step in range(int((end_s - start_s) / CATCH_UP_STEP_S)):
        at_s = start_s + step * CATCH_UP_STEP_S
        rate = tokens_per_s(run.exchanges, [Window(at_s, at_s + CATCH_UP_S)]) or 0.0
        if rate >= CATCH_UP_SHARE * before:
            return at_s - start_s
    return None


def _longest(run: Run) -> Figures:
    groups: Sequence[list[float]] = longest_gaps(run)
    return {
        name: {"streams": len(gaps)} | distribution(gaps)
        for name, gaps in zip(("affected", "unaffected"), groups, strict=True)
    }


def _times(run: Run, episode: Episode, around_s: float) -> Figures:
    """Seconds from the first kill to each step of a recovery."""
    before = tokens_per_s(run.exchanges, [Window(episode.start_s - around_s, episode.start_s)]) or 0.0
    return {
        "killed": [k.process.id for k in episode.killed],
        "hit": episode.hit,
        "detected_s": episode.detected_s,
        "next_token_s": max(next_tokens(run, episode.start_s), default=None),
        "reloaded_s": episode.reloaded_s,
        "redundant_s": episode.redundant_s,
        "caught_up_s": caught_up_s(run, episode.start_s, episode.end_s + around_s, before),
    }
