"""Groups the (row, expert) pairs of a layer by the server that computes them: what one message to each will carry.

Two ways to the same result: plain lists are faster for the few pairs of a decode step, which every token waits for, and
arrays for the many of a prefill.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

FEW_PAIRS = 64
"""Up to so many pairs lists are the faster way."""
_BITS, _MASK = 28, (1 << 28) - 1  # of a slot and of an expert in one key


class Packet(NamedTuple):
    """Slots for one server, sorted by expert, then by slot."""

    server: int  # index into the view's servers; negative: experts without a live replica
    slots: np.ndarray  # int64 [pairs]
    experts: np.ndarray  # int64 [pairs]
    rows: np.ndarray  # int64 [rows], the distinct rows of the slots, ascending
    pair_rows: np.ndarray  # int64 [pairs], the row of each slot
    distinct_experts: int


def pack(slots: np.ndarray | None, experts: np.ndarray, route: np.ndarray, top_k: int) -> list[Packet]:
    """The packets for `slots` (ascending; None: all) of a work, by ascending server.

    `experts` int64 [rows × k]: the expert of each slot of the work; `route` int [experts of the layer]: their servers.
    """
    few = len(experts if slots is None else slots) <= FEW_PAIRS
    return (pack_few if few else pack_many)(slots, experts, route, top_k)


def pack_few(slots: np.ndarray | None, experts: np.ndarray, route: np.ndarray, top_k: int) -> list[Packet]:
    """`pack` with lists."""
    server_of = route.tolist()
    chosen = (experts if slots is None else experts[slots]).tolist()
    keys: dict[int, list[int]] = {}
    for slot, expert in zip(range(len(chosen)) if slots is None else slots.tolist(), chosen, strict=True):
        server = server_of[expert]
        if server in keys:
            keys[server].append(expert << _BITS | slot)
        else:
            keys[server] = [expert << _BITS | slot]
    all_slots: list[int] = []
    all_experts: list[int] = []
    all_rows: list[int] = []
    all_pair_rows: list[int] = []
    ends = []
    for server in sorted(keys):
        mine = keys[server]
        mine.sort()
        my_experts = [key >> _BITS for key in mine]
        my_slots = [key & _MASK for key in mine]
        pair_rows = [slot // top_k for slot in my_slots]
        all_slots += my_slots
        all_experts += my_experts
        all_rows += sorted(set(pair_rows))
        all_pair_rows += pair_rows
        ends.append((server, len(all_slots), len(all_rows), len(set(my_experts))))
    return _cut(np.array(all_slots), np.array(all_experts), np.array(all_rows), np.array(all_pair_rows), ends)


def pack_many(slots: np.ndarray | None, experts: np.ndarray, route: np.ndarray, top_k: int) -> list[Packet]:
    """`pack` with arrays."""
    slots = np.arange(len(experts)) if slots is None else slots
    chosen = experts[slots]
    return pack_for(slots, chosen, route[chosen], top_k)


def pack_for(slots: np.ndarray, chosen: np.ndarray, servers: np.ndarray, top_k: int) -> list[Packet]:
    """The packets for `slots`, given the expert and the server of each; int [slots] all three."""
    servers = servers.astype(np.int64)
    order = (servers * (int(chosen.max(initial=0)) + 1) + chosen).argsort(kind="stable")
    slots, chosen, servers = slots[order], chosen[order], servers[order]
    starts = [0, *(np.flatnonzero(servers[1:] != servers[:-1]) + 1).tolist(), len(servers)]
    return [_packet(int(servers[a]), slots[a:b], chosen[a:b], top_k) for a, b in pairwise(starts)]


def split(packet: Packet, max_pairs: int, top_k: int) -> list[Packet]:
    """The same in messages of at most `max_pairs`."""
    n = len(packet.slots)
    if n <= max_pairs:
        return [packet]
    cuts = [slice(at, at + max_pairs) for at in range(0, n, max_pairs)]
    return [_packet(packet.server, packet.slots[c], packet.experts[c], top_k) for c in cuts]


def _packet(server: int, slots: np.ndarray, experts: np.ndarray, top_k: int) -> Packet:
    pair_rows = slots // top_k
    seen = np.zeros(int(pair_rows.max()) + 1, bool)
    seen[pair_rows] = True
    distinct = 1 + int(np.count_nonzero(experts[1:] != experts[:-1]))
    return Packet(server, slots, experts, np.flatnonzero(seen), pair_rows, distinct)


def _cut(
    slots: np.ndarray,
    experts: np.ndarray,
    rows: np.ndarray,
    pair_rows: np.ndarray,
    ends: list[tuple[int, int, int, int]],
) -> list[Packet]:
    packets, at, row = [], 0, 0
    for server, end, row_end, distinct in ends:
        packets.append(Packet(server, slots[at:end], experts[at:end], rows[row:row_end], pair_rows[at:end], distinct))
        at, row = end, row_end
    return packets
