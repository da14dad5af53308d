"""Groups the (row, expert) pairs of a layer by the server that computes them: what one message to each will carry.

Two ways to the same result: plain lists are faster for the few pairs of a decode step, which every token waits for, and
arrays for the many of a prefill.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

FEW_PAIRS = 64
"""Up to so many pairs, lists are faster than arrays."""
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
    chosen = experts if slots is None else experts[slots]
    n = len(route)
    keys = (route.astype(np.int64) + 1) * n + np.arange(n)  # of each expert: what its pairs are sorted by
    if int(keys.max()) < 1 << 16:
        keys = keys.astype(np.uint16)  # numpy sorts these in a quarter of the time
    return _cut_sorted(slots, chosen, keys[chosen], n, top_k)


def pack_for(slots: np.ndarray, chosen: np.ndarray, servers: np.ndarray, top_k: int) -> list[Packet]:
    """The packets for `slots`, given the expert and the server of each; int [slots] all three."""
    n = int(chosen.max(initial=0)) + 1
    return _cut_sorted(slots, chosen, (servers.astype(np.int64) + 1) * n + chosen, n, top_k)


def _cut_sorted(slots: np.ndarray | None, chosen: np.ndarray, keys: np.ndarray, n: int, top_k: int) -> list[Packet]:
    """The packets, given the expert and the key of each slot: key = (server + 1) × n + expert."""
    order = keys.argsort(kind="stable")
    keys, chosen = keys[order], chosen[order]
    slots = order if slots is None else slots[order]
    pair_rows = slots // top_k
    starts = np.zeros(1 + np.count_nonzero(other := keys[1:] != keys[:-1]), np.int64)  # of each expert's pairs
    starts[1:] = other.nonzero()[0] + 1
    servers = keys[starts] // n
    cuts = [0, *((servers[1:] != servers[:-1]).nonzero()[0] + 1).tolist()]  # of each server's experts
    packets = []
    for first, after in pairwise([*cuts, len(starts)]):
        part = slice(int(starts[first]), int(starts[after]) if after < len(starts) else len(slots))
        mine = pair_rows[part]
        rows = np.bincount(mine).nonzero()[0]
        packets.append(Packet(int(servers[first]) - 1, slots[part], chosen[part], rows, mine, after - first))
    return packets


def split(packet: Packet, max_pairs: int, top_k: int) -> list[Packet]:
    """The same in messages of at most `max_pairs`."""
    n = len(packet.slots)
    if n <= max_pairs:
        return [packet]
    cuts = [slice(at, at + max_pairs) for at in range(0, n, max_pairs)]
    return [_packet(packet.server, packet.slots[c], packet.experts[c], top_k) for c in cuts]


def _packet(server: int, slots: np.ndarray, experts: np.ndarray, top_k: int) -> Packet:
    pair_rows = slots // top_k
    distinct = 1 + int(np.count_nonzero(experts[1:] != experts[:-1]))
    return Packet(server, slots, experts, np.bincount(pair_rows).nonzero()[0], pair_rows, distinct)


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
