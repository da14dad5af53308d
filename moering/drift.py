"""When popularity drifts: levels the plan anew from time to time, by few moves, while the cluster is at rest. Pure.

Most of a drift costs nothing: the order of an expert's replicas changes, and no weights move. Only for what is left do
replicas move, at most `MOVED_SHARE` of all at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Set as AbstractSet

import numpy as np

from moering.balance import max_over_mean, server_loads
from moering.placement import Placement
from moering.ring import Plan

logger = logging.getLogger(__name__)

TOLERATED = 1.15
"""A layer's max/mean of tokens per server from which a new plan is tried."""
WORTH_IT = 0.01
"""So much lower must a new plan's max/mean be, as the mean over all layers: a token passes one after another."""
MOVED_SHARE = 0.02


class Drift:
    """Decides when to plan anew although nobody came or went."""

    def __init__(self, every_s: float, now_s: float) -> None:
        """`every_s`: the least time between two looks; 0 means never."""
        self._every_s, self._next_s = every_s, now_s + every_s

    def due(self, now_s: float) -> bool:
        """Whether it is time for another look."""
        return self._every_s > 0 and now_s >= self._next_s

    def follow(self, placement: Placement | None, doubtful: AbstractSet[str], now_s: float) -> str | None:
        """Level the plan for the popularity that `placement` knows, if need be. What was done, for people."""
        self._next_s = now_s + self._every_s
        plan, tokens = (None, None) if placement is None else (placement.plan, placement.popularity)
        if placement is None or plan is None or tokens is None or not placement.popularity_known:
            return None
        if doubtful or not placement.at_rest:
            return None
        before = balance_of(plan, tokens)
        if before.max(initial=0.0) <= TOLERATED:
            return None
        levelled = placement.levelled(max(2, int(MOVED_SHARE * placement.replication * tokens.size)))
        after = balance_of(levelled, tokens)
        if after.mean() > before.mean() - WORTH_IT:
            return None
        moved = moved_replicas(plan, levelled)
        placement.plan = levelled
        return (
            f"max/mean of tokens per server in a layer {before.mean():.2f} → {after.mean():.2f} "
            f"(worst layer {before.max():.2f} → {after.max():.2f}), {moved} replicas to load"
        )


def balance_of(plan: Plan, tokens: np.ndarray) -> np.ndarray:
    """Each layer's max/mean of tokens per server, [layers]."""
    return max_over_mean(server_loads(plan.replicas, plan.ways, tokens, len(plan.servers)))


def moved_replicas(before: Plan, after: Plan) -> int:
    """Replicas that somebody has to load for `after`."""
    return sum(int((after.mask_of(s) & ~before.mask_of(s)).sum()) for s in after.servers)
