"""Which replica serves an expert now: the first of its ordered list on a server of the best rank. Pure."""

from __future__ import annotations

import numpy as np

from router.health import GONE


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
