"""Spreads the rows of a hot expert over the replicas that share them.

An expert is hot when its rows alone are more than a server's fair share of a layer. The plan says how many of its
first replicas share them (`View.ways`); of every other expert the first has all. Two servers that compute an expert
both read its weights, which is what few rows take time for: so a work's rows are divided only where each part is large
enough, and few rows go as a whole to the replicas in turn. Which replica computes a row changes none of its bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from router.health import GONE
from router.packing import Packet, pack, pack_for

ROWS_PER_PART = 8

Shares = dict[int, np.ndarray]
"""Hot expert of a layer → the servers that share its rows now, int16 [2 or more]."""


def find_shares(routing: np.ndarray, absent: np.ndarray, ranks: np.ndarray, ways: np.ndarray) -> dict[int, Shares]:
    """The shares of each layer that has any.

    `routing`, `absent` and `ranks` are those of `router.choose.choose`, `ways` uint8 [layers, experts]. An expert's
    sharers are its first `ways` replicas of the best rank there is.
    """
    shares: dict[int, Shares] = {}
    for layer, expert in np.argwhere(ways > 1).tolist():
        row = routing[layer, expert]
        servers = row[(row >= 0) & ~absent[layer, expert]]
        servers = servers[ranks[servers] < GONE]
        if len(servers):
            servers = servers[ranks[servers] == ranks[servers].min()][: ways[layer, expert]]
        if len(servers) > 1:
            shares.setdefault(layer, {})[expert] = servers
    return shares


def pack_shared(
    slots: np.ndarray | None,
    experts: np.ndarray,
    route: np.ndarray,
    top_k: int,
    shares: Mapping[int, np.ndarray],
    turn: int,
) -> list[Packet]:
    """`router.packing.pack`, but the slots of the hot experts in `shares` are spread over their servers.

    `turn` says whose turn it is: the next number each time a layer is packed.
    """
    slots = np.arange(len(experts)) if slots is None else slots
    chosen = experts[slots]
    hot = [(at, sharers) for expert, sharers in shares.items() if len(at := np.flatnonzero(chosen == expert))]
    if not hot:
        return pack(slots, experts, route, top_k)
    servers = route[chosen]
    for at, sharers in hot:
        parts = min(len(sharers), max(1, len(at) // ROWS_PER_PART))
        servers[at] = sharers[(turn + np.arange(len(at)) * parts // len(at)) % len(sharers)]
    return pack_for(slots, chosen, servers, top_k)
