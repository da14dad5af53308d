"""Further replicas in host memory: which experts a server keeps at hand in case the plan gives them to it next."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from expert_server.residency import Key
from moering.checkpoint import ExpertWeights
from moering.protocol import View
from moering.ring_board import server_seed, walk_order

logger = logging.getLogger(__name__)


class HostReplicas(Protocol):
    """Experts in host memory that become usable within milliseconds (`expert_server.host_replicas_cuda`)."""

    capacity: int

    def keys(self) -> set[Key]:
        """What is there."""
        ...

    def keep(self, keys: set[Key]) -> None:
        """Forget all others."""
        ...

    def put(self, key: Key, weights: ExpertWeights) -> None:
        """Take a copy; there must be room."""
        ...

    def promote(self, key: Key) -> tuple[Any, bytes] | None:
        """The expert ready to compute, and its digest; None if it is not here. Or `NoRoom`."""
        ...


class NoReplicas:
    """For experts that are computed in host memory: what is there is usable at once, and there are no further ones."""

    capacity = 0

    def keys(self) -> set[Key]:
        """Nothing."""
        return set()

    def keep(self, keys: set[Key]) -> None:
        """There is nothing to forget."""

    def put(self, key: Key, weights: ExpertWeights) -> None:
        """There is never room."""
        raise AssertionError(f"no room for {key}")

    def promote(self, key: Key) -> None:
        """It is not here."""


def choose(view: View, server_id: str, room: int) -> list[Key]:
    """The `room` experts most likely to be asked of a server that does not hold them, likeliest first.

    A replica that is lost is placed along its expert's walk over the servers, so what counts is how many servers come
    before this one there that have no replica yet; then popularity.
    """
    if server_id not in view.servers or room <= 0:
        return []
    target = np.frombuffer(view.target, "<i2").reshape(view.layers, view.experts, view.width)
    popularity = np.frombuffer(view.popularity or bytes(target[..., 0].size), np.uint8).reshape(target.shape[:2])
    me, seeds = view.servers.index(server_id), np.array([server_seed(s) for s in view.servers], np.uint64)
    ranked = []
    for layer in range(view.layers):
        walk = walk_order(seeds, layer, view.experts)
        holds = (target[layer][:, :, None] == walk[:, None, :]).any(axis=1)  # [experts, place in the walk]
        mine = walk == me
        before = ~holds & (np.cumsum(mine, axis=1) == 0)
        for expert in np.flatnonzero(~(holds & mine).any(axis=1)).tolist():
            ranked.append((int(before[expert].sum()), -int(popularity[layer, expert]), layer, expert))
    return [(layer, expert) for _, _, layer, expert in sorted(ranked)[:room]]


def refill(
    view: View,
    server_id: str,
    replicas: HostReplicas,
    read: Callable[[int, int], ExpertWeights],
    rest: Callable[[float], bool],
    clock: Callable[[], float],
) -> None:
    """Bring host memory into line with `choose`. `rest(seconds that one took)` returns False to stop: a newer view."""
    wanted = choose(view, server_id, replicas.capacity)
    replicas.keep(set(wanted))
    held = replicas.keys()
    missing = [key for key in wanted if key not in held]
    for key in missing:
        begun = clock()
        replicas.put(key, read(*key))
        if not rest(clock() - begun):
            return
    if missing:
        logger.info("%d further experts are in host memory", len(wanted))
