"""The last steps of a plan: failure domains apart, counts level, loads level, all within a budget of moves.

Internal to `moering.ring`. Nothing here changes how many replicas an expert has.
"""

from __future__ import annotations

from collections.abc import Iterator

from moering.ring_board import Board
from moering.ring_order import LayerOrder, order_layer

TRIED = 3
"""How many of the fullest and of the emptiest servers are looked at for a move."""
Move = tuple[int, int, int]
"""Expert, from server, to server."""


def spread_domains(board: Board, budget: int) -> int:
    """Move replicas out of failure domains that hold another copy, where one without has room; the budget left."""
    if len(set(board.domains)) in (1, board.size):
        return budget
    for layer in range(board.layers):
        for expert, holders in enumerate(board.holders[layer]):
            crowded = [s for s in holders if board.crowding(layer, expert, s)]
            if not crowded or budget <= 0:
                continue
            used = {board.domains[s] for s in holders}
            free = [s for s in range(board.size) if board.room[s] > 0 and board.domains[s] not in used]
            if free:
                source = max(crowded, key=lambda s: (board.count[layer][s], s))
                board.drop(layer, expert, source)
                board.place(layer, expert, min(free, key=lambda s: board.key(layer, expert, s)))
                budget -= 1
    return budget


def level_counts(board: Board, eps: float, budget: int) -> int:
    """Move replicas from the fullest server of a layer to the emptiest while they differ; the budget left.

    This is how a joiner gets its share: the moves needed for that, and no others.
    """
    for layer in range(board.layers):
        while budget > 0 and _level_one(board, layer, eps):
            budget -= 1
    return budget


def _level_one(board: Board, layer: int, eps: float) -> bool:
    excess = [c - q for c, q in zip(board.count[layer], board.quota, strict=True)]
    sources = sorted(range(board.size), key=lambda s: (-excess[s], s))
    targets = sorted((s for s in range(board.size) if board.room[s] > 0), key=lambda s: (excess[s], s))
    for source in sources[:4]:
        if board.count[layer][source] <= (1 + eps) * board.quota[source]:
            continue
        for target in targets[:4]:
            if excess[source] - excess[target] <= 1 + 1e-9:
                break
            expert = _lightest_gap(board, layer, source, target)
            if expert is not None:
                board.drop(layer, expert, source)
                board.place(layer, expert, target)
                return True
    return False


def _lightest_gap(board: Board, layer: int, source: int, target: int) -> int | None:
    """The expert of `source` whose move to `target` levels their loads best and crowds no failure domain."""
    half = (board.load[layer][source] - board.load[layer][target]) / 2 * board.replication
    best: tuple[tuple[float, float], int] | None = None
    for expert in board.held[source, layer].nonzero()[0].tolist():
        if board.held[target, layer, expert]:
            continue
        crowded = _crowding_after(board, layer, expert, source, target) - board.crowding(layer, expert, source)
        if crowded > 0:
            continue
        key = (float(crowded), round(abs(board.weights[layer][expert] - half), 9))
        if best is None or key < best[0]:
            best = key, expert
    return None if best is None else best[1]


def _crowding_after(board: Board, layer: int, expert: int, source: int, target: int) -> int:
    domain = board.domains[target]
    return sum(board.domains[h] == domain and h != source for h in board.holders[layer][expert])


def level_loads(board: Board, eps: float, budget: int) -> list[LayerOrder]:
    """Order all layers, moving replicas while the fullest server's tokens exceed (1 + eps) × the mean, worst first."""
    orders = [_order(board, layer) for layer in range(board.layers)]
    excess = [_max_over_mean(order) for order in orders]
    for layer in sorted(range(board.layers), key=lambda n: (-excess[n], n)):
        order = orders[layer]
        while budget > 1 and _max_over_mean(order) > 1 + eps:
            better = next(filter(None, (_try(board, layer, order, m) for m in _load_moves(board, layer, order))), None)
            if better is None:
                break
            order, moves = better
            budget -= moves
        orders[layer] = order
    return orders


def _max_over_mean(order: LayerOrder) -> float:
    return max(order.load, default=0.0) * len(order.load) / (sum(order.load) or 1.0)


def _order(board: Board, layer: int) -> LayerOrder:
    return order_layer(board.holders[layer], board.weights[layer], board.size)


def _try(board: Board, layer: int, order: LayerOrder, moves: list[Move]) -> tuple[LayerOrder, int] | None:
    """Make the moves; the new order and their number if the highest loads fell, else take them back."""
    _apply(board, layer, moves)
    after = _order(board, layer)
    if _profile(after) < _profile(order):
        return after, len(moves)
    _apply(board, layer, [(expert, target, source) for expert, source, target in moves])
    return None


def _profile(order: LayerOrder) -> list[float]:
    return [round(load, 9) for load in sorted(order.load, reverse=True)]


def _load_moves(board: Board, layer: int, order: LayerOrder) -> Iterator[list[Move]]:
    """Moves worth a try: an expert from a server with many tokens to one with few, a light one back for the count."""
    servers = sorted(range(board.size), key=lambda s: (order.load[s], s))
    for source in servers[: -1 - TRIED : -1]:
        for target in servers[:TRIED]:
            gap = order.load[source] - order.load[target]
            gives = [
                e for e in _movable(board, layer, source, target) if 0 < _share(board, layer, order, e, source) < gap
            ]
            if gives:
                give = min(gives, key=lambda e: (abs(_share(board, layer, order, e, source) - gap / 2), e))
                yield from _with_return(board, layer, order, (give, source, target))
            yield from _exchange(board, layer, order, source, target)


def _with_return(board: Board, layer: int, order: LayerOrder, move: Move) -> Iterator[list[Move]]:
    source, target = move[1:]
    back = _movable(board, layer, target, source)
    if board.room[target] > 0 and board.count[layer][target] + 1 <= board.quota[target] + 1:
        yield [move]
    if back:
        take = min(back, key=lambda e: (_share(board, layer, order, e, target), board.weights[layer][e], e))
        yield [move, (take, target, source)]


def _exchange(board: Board, layer: int, order: LayerOrder, source: int, target: int) -> Iterator[list[Move]]:
    """The two experts whose exchange levels the two servers best: where each one of the fuller server's is too much."""
    gap = order.load[source] - order.load[target]
    gives = {e: _share(board, layer, order, e, source) for e in _movable(board, layer, source, target)}
    takes = {e: _share(board, layer, order, e, target) for e in _movable(board, layer, target, source)}
    pairs = [(abs(g - t - gap / 2), give, take) for give, g in gives.items() for take, t in takes.items() if t > 0]
    if pairs:
        left, give, take = min(pairs)
        if left < gap / 2:
            yield [(give, source, target), (take, target, source)]


def _share(board: Board, layer: int, order: LayerOrder, expert: int, server: int) -> float:
    """The tokens of `expert` that `server` computes."""
    ways = order.ways[expert]
    return board.weights[layer][expert] / ways if server in order.replicas[expert][:ways] else 0.0


def _movable(board: Board, layer: int, source: int, target: int) -> list[int]:
    held = (board.held[source, layer] & ~board.held[target, layer]).nonzero()[0].tolist()
    return [e for e in held if _crowding_after(board, layer, e, source, target) <= board.crowding(layer, e, source)]


def _apply(board: Board, layer: int, moves: list[Move]) -> None:
    for expert, source, _ in moves:
        board.drop(layer, expert, source)
    for expert, _, target in moves:
        board.place(layer, expert, target)
