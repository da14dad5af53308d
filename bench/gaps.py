"""How long streams stood still, in which window of time. Pure: lists of arrival times in, figures out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.client import Exchange

Interval = tuple[float, float]
"""(start, end) of a time without output, in seconds of `time.perf_counter`."""


@dataclass(frozen=True)
class Window:
    """A stretch of time, for one: from a kill until everything is as before."""

    start_s: float
    end_s: float

    def touches(self, interval: Interval) -> bool:
        """Whether any part of `interval` lies within."""
        return interval[1] > self.start_s and interval[0] < self.end_s

    def holds(self, at_s: float) -> bool:
        """Whether the moment lies within."""
        return self.start_s <= at_s < self.end_s


def intervals(exchange: Exchange) -> list[Interval]:
    """Between the arrivals of one stream. The wait for the first token is not among them."""
    return list(itertools.pairwise(a.at_s for a in exchange.arrivals))


def first_token_wait(exchange: Exchange) -> list[Interval]:
    """The wait for the first token; empty when none came."""
    return [(exchange.started_s, exchange.arrivals[0].at_s)] if exchange.arrivals else []


def within(spans: Iterable[Interval], window: Window) -> list[float]:
    """Lengths of the intervals that touch `window`; whole, as that is how long the reader waited."""
    return [end - start for start, end in spans if window.touches((start, end))]


def outside(spans: Iterable[Interval], windows: Sequence[Window]) -> list[float]:
    """Lengths of the intervals that touch none of `windows`."""
    return [end - start for start, end in spans if not any(w.touches((start, end)) for w in windows)]


def tokens_per_s(exchanges: Iterable[Exchange], windows: Sequence[Window]) -> float | None:
    """Tokens that arrived in `windows` by their length; None when they have none."""
    length_s = sum(w.end_s - w.start_s for w in windows)
    tokens = sum(a.tokens for e in exchanges for a in e.arrivals if any(w.holds(a.at_s) for w in windows))
    return tokens / length_s if length_s else None


def between(windows: Sequence[Window], whole: Window) -> list[Window]:
    """What is left of `whole` without `windows` (in order of time, none overlapping)."""
    edges = [whole.start_s, *(edge for w in windows for edge in (w.start_s, w.end_s)), whole.end_s]
    return [Window(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b > a]
