"""The account of a fault run as JSON and as Markdown."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.account import Account, Output, compare, total
from bench.client import Exchange
from bench.episodes import Episode
from bench.gaps import Interval, Window, between, first_token_wait, intervals, outside, tokens_per_s, within
from bench.report import distribution, quantile
from bench.streams import Recorded

_COLUMNS = (
    "over_kill_ms",
    "longest_gap_ms",
    "excess_ms",
    "affected_streams",
    "noticed_ms",
    "rerouted_ms",
    "redundant_ms",
    "replaced_ms",
)
ROWS = "rows lost / resent / hedged"
# Catching up after the last status of a recovery still belongs to the fault.
SETTLE_S = 0.25


@dataclass(frozen=True)
class Run:
    """All that was recorded: every request once without failure, then the streams and the faults among them."""

    reference: Sequence[Recorded]
    reference_s: float
    observed: Sequence[Recorded]
    episodes: Sequence[Episode]
    counters: Mapping[str, int]  # what those of the routers grew by while there were faults
    started_s: float
    ended_s: float

    @property
    def windows(self) -> list[Window]:
        """From each kill to the end of its recovery."""
        return [Window(e.start_s, e.end_s + SETTLE_S) for e in self.episodes]

    @property
    def exchanges(self) -> list[Exchange]:
        """Of the streams with faults."""
        return [r.exchange for r in self.observed]

    def spans(self, of: Callable[[Exchange], list[Interval]]) -> list[Interval]:
        """Intervals of all streams with faults."""
        return [interval for exchange in self.exchanges for interval in of(exchange)]

    def calm_gaps(self) -> list[float]:
        """Gaps of the run with faults, outside every fault: what the faults are held against."""
        return outside(self.spans(intervals), self.windows)

    def longest_by_stream(self) -> list[float]:
        """The longest gap of each stream in each fault."""
        gaps: dict[int, list[Interval]] = {}
        for recorded in self.observed:
            gaps.setdefault(recorded.stream, []).extend(intervals(recorded.exchange))
        return [max(found) for w in self.windows for spans in gaps.values() if (found := within(spans, w))]


def account(run: Run) -> Account:
    """Every stream of the run with faults against the same request without failure."""
    references = {r.request: Output.of(r.exchange) for r in run.reference}
    observed = ((references[r.request], r.exchange) for r in run.observed)
    return total(compare(reference, Output.of(e), e.error) for reference, e in observed)


def rows_cell(counters: Mapping[str, int]) -> str:
    """What stands under `ROWS`."""
    return " / ".join(str(counters.get(name, "-")) for name in ("rows_lost", "rows_resent", "hedged_rows"))


def only_resent(counters: Mapping[str, int]) -> bool:
    """Whether all that was lost was sent again and nothing was computed twice, as far as the counters tell."""
    restarted = counters.get("forwards_restarted", 0) + counters.get("tokens_recomputed", 0)
    return restarted == 0 and counters.get("rows_lost", 0) == counters.get("rows_resent", 0)


def report(run: Run) -> dict[str, Any]:
    """The whole account, ready for JSON. `kept` says whether nothing was lost, changed or restarted."""
    counts = account(run)
    faults = [_fault(run, episode, window) for episode, window in zip(run.episodes, run.windows, strict=True)]
    excess = [f["excess_ms"] for f in faults if f["excess_ms"] is not None]
    reference = [r.exchange for r in run.reference]
    calm = between(run.windows, Window(run.started_s, run.ended_s))
    return {
        "kept": counts.clean and only_resent(run.counters) and all(e.over for e in run.episodes),
        "account": dataclasses.asdict(counts),
        "errors": dict(Counter(e.error for e in run.exchanges if e.error)),
        "without_failure": {
            "requests": len(reference),
            "tokens_per_s": round(sum(e.output_tokens for e in reference) / run.reference_s, 2),
            "gap_ms": distribution(b - a for e in reference for a, b in intervals(e)),
        },
        "between_faults": {
            "tokens_per_s": _rounded(tokens_per_s(run.exchanges, calm)),
            "gap_ms": distribution(run.calm_gaps()),
            "first_token_ms": distribution(outside(run.spans(first_token_wait), run.windows)),
        },
        "during_faults": {
            "tokens_per_s": _rounded(tokens_per_s(run.exchanges, run.windows)),
            "gap_ms": distribution(g for w in run.windows for g in within(run.spans(intervals), w)),
            "first_token_ms": distribution(g for w in run.windows for g in within(run.spans(first_token_wait), w)),
        },
        "excess_ms": {"median": quantile(excess, 0.5), "worst": max(excess)} if excess else None,
        "counters": dict(run.counters),
        "hits": sum(f["hit"] is True for f in faults),
        "faults": faults,
    }


def _fault(run: Run, episode: Episode, window: Window) -> dict[str, Any]:
    """The figures of one fault. Affected: a stream whose gap over the kill is longer than any without a fault.

    `over_kill_ms` is the longest gap that the kill fell into, so the cost of finding out and sending again alone;
    `longest_gap_ms` looks at the whole recovery, in which the dead server starts again on the same processors.
    """
    calm_s = max(run.calm_gaps(), default=0.0)
    longest_s = max(within(run.spans(intervals), window), default=None)
    over_kill = within(run.spans(intervals), Window(episode.start_s, episode.start_s + 1e-9))
    return {
        "killed": [{"id": k.process.id, "kind": k.process.kind, "pid": k.process.pid} for k in episode.killed],
        "at_s": round(episode.start_s - run.started_s, 3),
        "streams": episode.streams,
        "hit": episode.hit,
        "longest_gap_ms": _ms(longest_s),
        "excess_ms": None if longest_s is None else _ms(longest_s - calm_s),
        "over_kill_ms": _ms(max(over_kill, default=None)),
        "affected_streams": sum(g > calm_s for g in over_kill),
        "longest_first_token_ms": _ms(max(within(run.spans(first_token_wait), window), default=None)),
        "noticed_ms": _ms(episode.noticed_s),
        "rerouted_ms": _ms(episode.rerouted_s),
        "redundant_ms": _ms(episode.redundant_s),
        "replaced_ms": _ms(episode.replaced_s),
        "counters": episode.counted(),
    }


def _ms(seconds: float | None) -> Any:
    return None if seconds is None else round(seconds * 1e3, 1)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def markdown(result: dict[str, Any]) -> str:
    """The account for a page of the documentation."""
    counts, excess = result["account"], result["excess_ms"]
    lines = [
        f"{len(result['faults'])} faults ({', '.join(result['config']['kill'])}), {result['hits']} of them known to "
        f"have hit an outstanding dispatch; {counts['requests']} requests with {counts['tokens']} tokens.",
        "",
        "| lost | duplicated | changed | other digests | errors |",
        "|---|---|---|---|---|",
        f"| {counts['lost']} | {counts['duplicated']} | {counts['changed']} | "
        f"{counts['changed_digests'] + counts['missing_digests']} | {counts['errors']} |",
        "",
        "| | tokens/s | gap p50 ms | p99 | longest |",
        "|---|---|---|---|---|",
        *(
            _row(name.replace("_", " "), result[name])
            for name in ("without_failure", "between_faults", "during_faults")
        ),
        "",
    ]
    if excess:
        lines += [
            f"Longest gap per fault less the longest between faults: median {excess['median']} ms, "
            f"worst {excess['worst']} ms.",
            "",
        ]
    if result["counters"]:
        shown = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in sorted(result["counters"].items()))
        lines += [f"Counted by the routers meanwhile: {shown}.", ""]
    lines += [
        f"| fault | killed | hit | {' | '.join(c.replace('_', ' ') for c in _COLUMNS)} | {ROWS} |",
        "|---" * (len(_COLUMNS) + 4) + "|",
    ]
    for number, fault in enumerate(result["faults"], 1):
        killed = ", ".join(k["id"] for k in fault["killed"])
        cells = [
            number,
            killed,
            {True: "yes", False: "no", None: "?"}[fault["hit"]],
            *(fault[c] for c in _COLUMNS),
            rows_cell(fault["counters"]),
        ]
        lines.append("| " + " | ".join("-" if c is None else str(c) for c in cells) + " |")
    return "\n".join(lines) + "\n"


def _row(name: str, figures: dict[str, Any]) -> str:
    cells = [name, figures["tokens_per_s"], *figures["gap_ms"].values()]
    return "| " + " | ".join("-" if c is None else str(c) for c in cells) + " |"
