"""The board on which a plan is worked out: who holds what, how full every server is, and where a replica goes best.

Internal to `moering.ring`. Servers, layers and experts are indices here. Plain Python lists on purpose: the search
looks at a few servers at a time, where they beat arrays by far.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moering.ring_order import wanted_ways

WALK_LENGTH = 24
"""A replica is looked for on the first servers of its expert's walk, and among all only if none of these will do."""
LOAD_STEPS = 16
"""Loads are compared in this many steps of a fair share, so that the walk decides between servers about equal."""

Key = tuple[int, int, float, int]


def server_seed(server_id: str) -> int:
    """64 bits of a server's id, the same in every process (`hash` is not)."""
    return int.from_bytes(hashlib.blake2b(server_id.encode(), digest_size=8).digest(), "little")


def walk_order(seeds: npt.NDArray[np.uint64], layer: int, experts: int) -> npt.NDArray[np.int64]:
    """The rendezvous order of all servers for each expert of a layer, [experts, servers]."""
    with np.errstate(over="ignore"):
        keys = np.uint64(layer * 65536 + 1) + np.arange(experts, dtype=np.uint64)
        x = seeds[None, :] ^ (keys[:, None] * np.uint64(0x9E3779B97F4A7C15))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return np.argsort(x, axis=1, kind="stable")


def fair_quota(capacities: Sequence[int], wanted: int, pairs: int) -> list[float]:
    """How many of `wanted` replicas each server should hold: equal shares, cut by capacity and by `pairs`."""
    limits = [min(c, pairs) for c in capacities]
    quota = [0.0] * len(limits)
    left, order = float(min(wanted, sum(limits))), sorted(range(len(limits)), key=lambda s: limits[s])
    for i, s in enumerate(order):
        quota[s] = min(limits[s], left / (len(order) - i))
        left -= quota[s]
    return quota


class Board:
    """Replicas while they are being placed. `weights[l][e]` is an expert's share of its layer's tokens."""

    def __init__(
        self,
        server_ids: Sequence[str],
        capacities: Sequence[int],
        domains: Sequence[str],
        weights: list[list[float]],
        replication: int,
    ) -> None:
        self.size, self.replication, self.weights = len(server_ids), replication, weights
        self.layers, self.experts = len(weights), len(weights[0])
        self.pull = [[w * min(1.0, replication / wanted_ways(w, self.size)) for w in row] for row in weights]
        """The weight that counts for placing: a hot expert's tokens are shared by more replicas than others have."""
        pairs = self.layers * self.experts
        self.domains = list(domains)
        self.room = list(capacities)
        quota = fair_quota(capacities, replication * pairs, pairs)
        self.quota = [q / self.layers for q in quota]
        self.whole = [math.floor(q + 1e-9) for q in self.quota]
        self.above = [self.layers * (w - q) for q, w in zip(self.quota, self.whole, strict=True)]
        """Replicas above the whole part of the quota, over all layers, less those due: lowest is next to get one."""
        self.holders: list[list[list[int]]] = [[[] for _ in range(self.experts)] for _ in range(self.layers)]
        self.copies: npt.NDArray[np.int16] = np.zeros((self.layers, self.experts), np.int16)
        self.count = [[0] * self.size for _ in range(self.layers)]
        self.load = [[0.0] * self.size for _ in range(self.layers)]
        self.shared: list[dict[int, float]] = [{} for _ in range(self.layers)]
        """Per layer: weight that two servers hold both, by `a * size + b`: what one gets when the other dies."""
        self.held: npt.NDArray[np.bool_] = np.zeros((self.size, self.layers, self.experts), np.bool_)
        self._seeds = np.array([server_seed(i) for i in server_ids], np.uint64)
        self._walks: dict[int, list[list[int]]] = {}

    def place(self, layer: int, expert: int, server: int) -> None:
        """Give `server` a replica."""
        self._change(layer, expert, server, 1)
        self.holders[layer][expert].append(server)

    def drop(self, layer: int, expert: int, server: int) -> None:
        """Take the replica away again."""
        self.holders[layer][expert].remove(server)
        self._change(layer, expert, server, -1)

    def _change(self, layer: int, expert: int, server: int, sign: int) -> None:
        weight, shared = sign * self.pull[layer][expert], self.shared[layer]
        for other in self.holders[layer][expert]:
            for key in (other * self.size + server, server * self.size + other):
                shared[key] = shared.get(key, 0.0) + weight
        if self.count[layer][server] + min(sign, 0) >= self.whole[server]:
            self.above[server] += sign
        self.count[layer][server] += sign
        self.load[layer][server] += weight / self.replication
        self.room[server] -= sign
        self.copies[layer, expert] += sign
        self.held[server, layer, expert] = sign > 0

    def count_of(self, server: int) -> int:
        """Replicas of a server in all layers."""
        return sum(count[server] for count in self.count)

    def walk(self, layer: int, expert: int) -> list[int]:
        """The expert's walk: the servers it meets first on the ring."""
        if layer not in self._walks:
            self._walks[layer] = walk_order(self._seeds, layer, self.experts)[:, :WALK_LENGTH].tolist()
        return self._walks[layer][expert]

    def crowding(self, layer: int, expert: int, server: int) -> int:
        """How many other holders of the expert share the server's failure domain."""
        domain = self.domains[server]
        return sum(self.domains[h] == domain and h != server for h in self.holders[layer][expert])

    def key(self, layer: int, expert: int, server: int) -> Key:
        """What a replica there would cost, lowest first: failure domain, count in the layer, load after a death."""
        over = math.ceil(self.count[layer][server] + 1 - self.quota[server] - 1e-9)
        weight = self.pull[layer][expert]
        others = [h for h in self.holders[layer][expert] if h != server]
        shared = self.shared[layer]
        inherited = max((shared.get(h * self.size + server, 0.0) + weight for h in others), default=0.0)
        load = self.load[layer][server] + (weight + inherited) / self.replication
        above = self.above[server] if over > 0 else 0.0
        return self.crowding(layer, expert, server), max(over, 0), above, round(load * self.size * LOAD_STEPS)

    def best_server(self, layer: int, expert: int) -> int | None:
        """The server with room where a new replica goes best, or None."""
        best: tuple[Key, int] | None = None
        for servers in (self.walk(layer, expert), range(self.size)):
            for server in servers:
                if self.room[server] > 0 and server not in self.holders[layer][expert]:
                    key = self.key(layer, expert, server)
                    if best is None or key < best[0]:
                        best = key, server
            if best is not None and (best[0][:2] <= (0, 1) or self.size <= WALK_LENGTH):
                break
        return None if best is None else best[1]

    def make_room(self, layer: int, expert: int) -> int | None:
        """Free memory for a replica: drop a hot extra, else shift replicas along, else drop a less needed copy."""
        if not self.size:
            return None
        server = self._drop_for(layer, expert, self.replication + 1)
        if server is None:
            server = self._shift_for(layer, expert)
        return self._drop_for(layer, expert, 0) if server is None else server

    def _drop_for(self, layer: int, expert: int, least: int) -> int | None:
        """Drop a copy of an expert that keeps more copies than this one has; the server that got room, or None."""
        least = max(least, int(self.copies[layer, expert]) + 2)
        donors = np.argwhere(self.copies >= least)
        if not len(donors):
            return None
        ranked = sorted(donors.tolist(), key=lambda d: (-int(self.copies[d[0], d[1]]), self.weights[d[0]][d[1]]))
        for donor_layer, donor in ranked:
            able = [
                s for s in self.holders[donor_layer][donor] if not self.held[s, layer, expert] and self.room[s] >= 0
            ]
            if able:
                server = min(
                    able, key=lambda s: (self.crowding(layer, expert, s), -self.crowding(donor_layer, donor, s))
                )
                self.drop(donor_layer, donor, server)
                return server
        return None

    def _shift_for(self, layer: int, expert: int) -> int | None:
        """Free a place on a full server by moving replicas along the shortest chain that ends where there is room.

        Every server with room holds the expert already. A breadth-first search over servers: from one to the next
        goes a replica that the next does not hold.
        """
        ends = {s for s in range(self.size) if self.room[s] > 0}
        starts = [s for s in range(self.size) if not self.held[s, layer, expert]] if ends else []
        came: dict[int, int] = dict.fromkeys(starts, -1)
        queue = list(starts)
        for server in queue:
            for target in range(self.size):
                if target in came or not bool((self.held[server] & ~self.held[target]).any()):
                    continue
                came[target] = server
                queue.append(target)
                if target in ends:
                    return self._shift_along(came, target, layer)
        return None

    def _shift_along(self, came: dict[int, int], target: int, layer: int) -> int:
        while came[target] >= 0:
            server = came[target]
            movable = np.argwhere(self.held[server] & ~self.held[target]).tolist()
            same_layer = [m for m in movable if m[0] == layer] or movable
            moved_layer, moved = min(same_layer, key=lambda m: self.crowding(m[0], m[1], target))
            self.drop(moved_layer, moved, server)
            self.place(moved_layer, moved, target)
            target = server
        return target
