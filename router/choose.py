"""Which replica serves an expert now: the one place that owns suspicion, bans and their end.

Pure: no socket, no clock; time is an argument. `Health` is what a router alone believes of one expert server, within
milliseconds and reversibly. It changes no plan: that is the coordinator's, on stronger evidence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

GOOD, DOUBTED, GONE = 0, 1, 2
FIRST_BAN_S, LONGEST_BAN_S = 0.5, 30.0


@dataclass
class Health:
    """One expert server as this router sees it."""

    connected: bool = False
    incarnation: int = 0
    banned_until_s: float = 0.0
    losses: int = 0  # in a row; a ban doubles with each

    def lost(self, now_s: float) -> None:
        """The connection broke: nothing goes there until it is back, and for a growing time only as a last resort."""
        self.connected = False
        self.losses += 1
        self.banned_until_s = now_s + min(FIRST_BAN_S * 2 ** (self.losses - 2), LONGEST_BAN_S) * (self.losses > 1)

    def came_back(self, incarnation: int) -> None:
        """A connection is up. A new incarnation starts with a clean record."""
        if incarnation != self.incarnation:
            self.losses, self.banned_until_s = 0, 0.0
        self.connected, self.incarnation = True, incarnation

    def answered(self) -> None:
        """A reply arrived: it is well."""
        if self.losses:
            self.losses, self.banned_until_s = 0, 0.0

    def rank(self, now_s: float) -> int:
        """GOOD before DOUBTED (banned: used when every other holder is gone) before GONE."""
        if not self.connected:
            return GONE
        return DOUBTED if now_s < self.banned_until_s else GOOD


def choose(routing: np.ndarray, absent: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """The server of each expert: int16 [layers, experts], -1 where no replica can serve.

    `routing` int16 [layers, experts, width] holds the ordered replicas (-1 pads), `absent` bool of that shape the
    replicas that answered `not_here`, `ranks` int [servers] the rank of each server. The first replica of the best rank
    wins: two servers that both compute an expert would both read its weights.
    """
    width = routing.shape[2]
    usable = (routing >= 0) & ~absent
    ranks = np.append(ranks, GONE)  # where routing's -1 points
    order = ranks[routing] * width + np.arange(width)
    order = np.where(usable & (ranks[routing] < GONE), order, GONE * width)
    best = order.argmin(axis=2)[..., None]
    chosen = np.take_along_axis(routing, best, axis=2)
    found = np.take_along_axis(order, best, axis=2) < GONE * width
    return np.where(found, chosen, -1)[..., 0].astype(np.int16)


def rank_all(servers: list[str], health: Mapping[str, Health], now_s: float) -> np.ndarray:
    """`Health.rank` of every server of a view, GONE for those never connected to."""
    return np.array([health[s].rank(now_s) if s in health else GONE for s in servers], dtype=np.int64)
