"""Which replica of an expert takes its tokens: the order of the replicas, balanced within a layer.

Internal to `moering.ring`. Changing an order moves no weights, so it is worked out anew for every plan, from the sets
of holders alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SWEEPS = 16
"""Upper bound of the improvement rounds; two or three are usual."""
MARGIN = 1e-9
HEAVY_TRIED = 4
"""How many of the heaviest experts of the fullest server are tried elsewhere when no chain helps."""


@dataclass(slots=True)
class LayerOrder:
    """The ordered replicas and `ways` of each expert of a layer, and each server's share of the layer's tokens."""

    replicas: list[list[int]]
    ways: list[int]
    load: list[float]


def wanted_ways(weight: float, servers: int) -> int:
    """How many servers should share an expert: 1 unless it alone exceeds a server's fair share."""
    return max(1, min(servers, math.ceil(weight * servers * (1 - 1e-6))))


def order_layer(holders: Sequence[Sequence[int]], weights: Sequence[float], servers: int) -> LayerOrder:
    """Choose the first replicas so that the servers' loads are level, and the next so that a death spreads well."""
    order = LayerOrder([sorted(h) for h in holders], [1] * len(holders), [0.0] * servers)
    inherited = [[0.0] * servers for _ in range(servers)]  # [dead][heir]
    heaviest_first = sorted(range(len(holders)), key=lambda e: (-weights[e], e))
    for e in heaviest_first:
        if order.replicas[e]:
            _choose_first(order, inherited, e, weights[e], servers)
    single = [e for e in heaviest_first if order.ways[e] == 1 and len(order.replicas[e]) > 1]
    for _ in range(SWEEPS):
        if not any([_improve(order, inherited, e, weights[e]) for e in single]):
            break
    for _ in range(4 * servers):
        if not _relieve(order, inherited, weights, single):
            break
    return order


def _choose_first(order: LayerOrder, inherited: list[list[float]], e: int, weight: float, servers: int) -> None:
    replicas = order.replicas[e]
    ways = order.ways[e] = min(len(replicas), wanted_ways(weight, servers))
    share = weight / ways
    heir = replicas[1] if len(replicas) == 2 else -1

    def cost(s: int) -> tuple[float, float]:
        other = replicas[0] if s == heir else heir
        return round(order.load[s], 9), inherited[s][other] if heir >= 0 else 0.0

    replicas[:] = sorted(replicas, key=cost)  # not sort(): it empties the list that `cost` looks at
    for s in replicas[:ways]:
        order.load[s] += share
    _order_heirs(replicas, ways, inherited, share)


def _order_heirs(replicas: list[int], ways: int, inherited: list[list[float]], share: float) -> None:
    first = replicas[0]
    replicas[ways:] = sorted(replicas[ways:], key=lambda s: (round(inherited[first][s], 9), s))
    if len(replicas) > ways:
        inherited[first][replicas[ways]] += share


def _improve(order: LayerOrder, inherited: list[list[float]], e: int, weight: float) -> bool:
    """Hand the expert to another of its holders if that lowers the higher of the two loads."""
    replicas, load = order.replicas[e], order.load
    first = replicas[0]
    other = min(replicas[1:], key=lambda s: (load[s], s))
    level = load[other] + weight - load[first]
    evens_heirs = inherited[other][first] + weight < inherited[first][replicas[1]] - MARGIN
    if level > MARGIN or (level > -MARGIN and not evens_heirs):
        return False
    _hand_over(order, inherited, e, weight, other)
    return True


def _hand_over(order: LayerOrder, inherited: list[list[float]], e: int, weight: float, other: int) -> None:
    """Make `other` the first replica of an expert."""
    replicas, first = order.replicas[e], order.replicas[e][0]
    order.load[first] -= weight
    order.load[other] += weight
    inherited[first][replicas[1]] -= weight
    replicas.remove(other)
    replicas.insert(0, other)
    _order_heirs(replicas, 1, inherited, weight)


def _relieve(order: LayerOrder, inherited: list[list[float]], weights: Sequence[float], single: list[int]) -> bool:
    """Lower the highest load: along a chain of servers, or by a heavy expert whose taker is relieved in turn."""
    load = order.load
    top = max(range(len(load)), key=lambda s: load[s])
    limit = load[top] - MARGIN
    if _drain(order, inherited, weights, single, top, limit):
        return True
    heavy = [h for h in single if order.replicas[h][0] == top][:HEAVY_TRIED]
    for e, other in [(h, s) for h in heavy for s in order.replicas[h][1:]]:
        before = [list(r) for r in order.replicas], list(load), [list(row) for row in inherited]
        _hand_over(order, inherited, e, weights[e], other)
        while load[other] >= limit and _drain(order, inherited, weights, single, other, limit):
            pass
        if load[other] < limit:
            return True
        order.replicas[:], load[:], inherited[:] = before
    return False


def _drain(
    order: LayerOrder,
    inherited: list[list[float]],
    weights: Sequence[float],
    single: list[int],
    source: int,
    limit: float,
) -> bool:
    """Hand one expert of `source` on, along the shortest chain of servers that all stay below `limit`."""
    load = order.load
    firsts: dict[int, list[int]] = {}
    for e in single:
        firsts.setdefault(order.replicas[e][0], []).append(e)
    came: dict[int, tuple[int, int]] = {}  # server → (expert that arrives, server it comes from)
    queue = [source]
    for server in queue:
        for e in firsts.get(server, ()):
            if server != source and load[server] + weights[came[server][0]] - weights[e] >= limit:
                continue
            for target in order.replicas[e][1:]:
                if target in came or target == source:
                    continue
                came[target] = e, server
                if load[target] + weights[e] < limit:
                    _hand_along(order, inherited, weights, came, target, source)
                    return True
                queue.append(target)
    return False


def _hand_along(
    order: LayerOrder,
    inherited: list[list[float]],
    weights: Sequence[float],
    came: dict[int, tuple[int, int]],
    target: int,
    start: int,
) -> None:
    while target != start:
        e, source = came[target]
        _hand_over(order, inherited, e, weights[e], target)
        target = source
