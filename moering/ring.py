"""Where the replicas of every expert live: `plan`, a pure and deterministic function.

No socket, no clock, no torch; equal arguments give equal plans in every process. Each expert's replicas form an ordered
list. Consistent hashing (`ring_board.walk_order`) gives each expert its walk over the servers, and on top of it a plan
remembers the one before:

1. surviving replicas stay;
2. missing ones are placed, heaviest expert first, where the load after the death of a present holder is least, in
   another failure domain if there is one;
3. a joiner is filled from the fullest;
4. experts hotter than a server's fair share get extra replicas while memory allows;
5. more moves only while a layer is out of balance, within a budget.

When memory is short, first copies come before second ones, and those before hot extras.

Example: 3 servers, 2 layers of 4 experts, two replicas each::

    >>> p = plan(None, [Member(s, 8) for s in "abc"], None, 2, layers=2, experts=4)
    >>> p.servers, p.replicas.shape, failures_survivable(p.replicas, p.servers)
    (('a', 'b', 'c'), (2, 4, 2), 1)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moering.errors import PlanError
from moering.ring_balance import level_counts, level_loads, spread_domains
from moering.ring_board import Board
from moering.ring_order import LayerOrder, wanted_ways

EPS_PLANNED = 0.10
EPS_FAILURE = 0.15

Replicas = npt.NDArray[np.int16]


@dataclass(frozen=True, slots=True)
class Member:
    """An expert server as the plan sees it. `capacity`: replicas it may be given; it keeps its own head-room for moves.

    JOINING and ONLINE servers get replicas, DRAINING ones are emptied, OFFLINE ones do not exist. Servers of one
    `zone` may die together; an empty zone means a failure domain of its own.
    """

    server_id: str
    capacity: int
    zone: str = ""
    state: str = "ONLINE"


@dataclass(frozen=True, slots=True)
class Plan:
    """Which server should hold which expert.

    `replicas` is int16 [layers, experts, width]: ordered indices into `servers`, -1 padded. The first `ways` of an
    expert (uint8 [layers, experts]) share its tokens.
    """

    servers: tuple[str, ...]
    replicas: Replicas
    ways: npt.NDArray[np.uint8]

    def mask_of(self, server_id: str) -> npt.NDArray[np.bool_]:
        """What a server should hold, bool [layers, experts]; nothing for a server unknown to the plan."""
        if server_id not in self.servers:
            return np.zeros(self.replicas.shape[:2], np.bool_)
        mask: npt.NDArray[np.bool_] = (self.replicas == self.servers.index(server_id)).any(axis=2)
        return mask


def orphans(replicas: Replicas) -> int:
    """Experts without a replica."""
    return int(((replicas >= 0).sum(axis=2) == 0).sum())


def under_target(replicas: Replicas, replication: int) -> int:
    """Experts with fewer than `replication` replicas."""
    return int(((replicas >= 0).sum(axis=2) < replication).sum())


def failures_survivable(replicas: Replicas, servers: Sequence[str], zones: Mapping[str, str] | None = None) -> int:
    """The largest k such that any k failure domains may die and every expert keeps a replica; -1 with an orphan.

    `zones` maps a server to its zone; without one (or with "") the server is a domain of its own.
    """
    zones = zones or {}
    names = [_domain(s, zones.get(s, "")) for s in servers]
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    table = np.array([numbers[n] for n in names] + [-1], np.int64)  # index -1 is the padding
    domains = np.sort(table[replicas], axis=2)
    fresh = domains >= 0
    fresh[:, :, 1:] &= domains[:, :, 1:] != domains[:, :, :-1]
    return int(fresh.sum(axis=2).min()) - 1


def failures_restorable(members: Sequence[Member], replication: int, pairs: int) -> int:
    """The largest k such that after the loss of any k failure domains the others have memory for full redundancy.

    That is `replication` replicas of each of `pairs` experts, each in another domain. -1: there is not enough now.
    """
    room: dict[str, int] = {}
    for m in members:
        if m.state in ("JOINING", "ONLINE"):
            domain = _domain(m.server_id, m.zone)
            room[domain] = min(room.get(domain, 0) + m.capacity, pairs)  # a second copy there would not count
    left = sorted(room.values())
    lost = -1
    while len(left) >= replication and sum(left) >= replication * pairs:
        lost += 1
        left.pop()  # the worst loss is that of the largest
    return lost


def plan(
    previous: Plan | None,
    members: Sequence[Member],
    popularity: npt.NDArray[np.floating] | None,
    replication: int,
    layers: int,
    experts: int,
    moves: int = 0,
) -> Plan:
    """The placement for `members`, as close to `previous` as the rules of this module allow.

    `popularity` [layers, experts] counts tokens; None: not known, the experts that `previous` shares among servers are
    hot and the others equal. `moves` replicas may move to level the loads though nobody came or went. An expert may end
    with fewer replicas than `replication`, or none, where memory or servers do not suffice. Raises `PlanError` for
    arguments without meaning.
    """
    _check(previous, members, replication, layers, experts)
    if popularity is None and previous is not None:
        popularity = _assumed(previous, len(members))
    weights = _weights(popularity, layers, experts)
    active = sorted((m for m in members if m.state in ("JOINING", "ONLINE")), key=lambda m: m.server_id)
    servers = tuple(m.server_id for m in active)
    domains = [_domain(m.server_id, m.zone) for m in active]
    board = Board(servers, [m.capacity for m in active], domains, weights, replication)
    if previous is not None:
        _keep(board, previous, servers)
        _trim(board)
    kept = int(np.minimum(board.copies, replication).sum())
    _fill(board)
    lost = int(np.minimum(board.copies, replication).sum()) - kept
    joined = previous is None or not set(servers) <= set(previous.servers)
    eps = EPS_PLANNED if joined or moves else EPS_FAILURE
    budget = _budget(board, previous, servers, lost) + moves
    if budget and servers:
        budget = level_counts(board, eps, spread_domains(board, budget))
    return _finish(servers, level_loads(board, eps, budget), replication)


def _domain(server_id: str, zone: str) -> str:
    return f"zone {zone}" if zone else f"server {server_id}"


def _weights(popularity: npt.NDArray[np.floating] | None, layers: int, experts: int) -> list[list[float]]:
    if layers < 1 or experts < 1:
        raise PlanError(f"a model of {layers} MoE layers with {experts} experts cannot be placed")
    tokens = np.ones((layers, experts)) if popularity is None else np.asarray(popularity, np.float64)
    if tokens.shape != (layers, experts):
        raise PlanError(f"popularity of shape {tokens.shape} for {layers} layers of {experts} experts")
    if not np.isfinite(tokens).all() or (tokens < 0).any():
        raise PlanError("popularity must be finite and not negative")
    sums = tokens.sum(axis=1, keepdims=True)
    shares: list[list[float]] = np.where(sums > 0, tokens / np.where(sums > 0, sums, 1), 1 / experts).tolist()
    return shares


def _assumed(previous: Plan, servers: int) -> npt.NDArray[np.float64]:
    """Tokens that would have led to the `ways` of `previous`: its hot experts stay hot until more is known."""
    ways = previous.ways.astype(np.float64)
    hot = np.where(ways > 1, (ways - 0.5) / max(servers, 1), 0.0)
    hot *= np.minimum(1, 0.9 / np.maximum(hot.sum(axis=1, keepdims=True), 1e-9))  # something is left for the others
    rest = (1 - hot.sum(axis=1, keepdims=True)) / np.maximum((ways <= 1).sum(axis=1, keepdims=True), 1)
    return np.where(ways > 1, hot, rest)


def _check(previous: Plan | None, members: Sequence[Member], replication: int, layers: int, experts: int) -> None:
    if replication < 1:
        raise PlanError(f"a replication of {replication}")
    if len({m.server_id for m in members}) != len(members):
        raise PlanError("two members have the same server id")
    if any(m.capacity < 0 for m in members):
        raise PlanError("a member has a negative capacity")
    if previous is not None and previous.replicas.shape[:2] != (layers, experts):
        raise PlanError(f"the previous plan is for {previous.replicas.shape[:2]}, not {(layers, experts)}")


def _keep(board: Board, previous: Plan, servers: tuple[str, ...]) -> None:
    """Step 1: the replicas of servers that are still there."""
    index = {s: i for i, s in enumerate(servers)}
    now = [index.get(s, -1) for s in previous.servers]
    for layer, rows in enumerate(previous.replicas.tolist()):
        for expert, row in enumerate(rows):
            for old in row:
                if old >= 0 and now[old] >= 0 and board.room[now[old]] > 0:
                    board.place(layer, expert, now[old])


def _trim(board: Board) -> None:
    """Drop extras that are no longer hot, with a margin so that a hovering expert does not come and go."""
    for layer, expert in np.argwhere(board.copies > board.replication).tolist():
        wanted = wanted_ways(1.5 * board.weights[layer][expert], board.size)
        while board.copies[layer, expert] > max(board.replication, wanted):
            holders = board.holders[layer][expert]
            board.drop(
                layer, expert, max(holders, key=lambda s: (board.crowding(layer, expert, s), board.load[layer][s], s))
            )


def _fill(board: Board) -> None:
    """Steps 2 and 4: all first copies, then all second ones, and so on; heaviest expert first.

    If there is memory for all, the copies that share a hot expert's tokens come with the first ones, since they are the
    heaviest to place; else they come last.
    """
    wanted = np.array([[wanted_ways(w, board.size) for w in row] for row in board.weights], np.int16)
    missing = int(np.maximum(np.maximum(wanted, board.replication) - board.copies, 0).sum())
    early = missing <= sum(board.room)
    heaviest = [sorted(range(board.experts), key=lambda e: (-w[e], e)) for w in board.weights]
    for copies in range(1, min(board.replication, board.size) + 1):
        for layer in range(board.layers):
            for expert in heaviest[layer]:
                goal = max(copies, int(wanted[layer, expert])) if early else copies
                while board.copies[layer, expert] < goal and _place(board, layer, expert, must=True):
                    pass
    for layer, expert in np.argwhere(wanted > board.copies).tolist():
        while board.copies[layer, expert] < wanted[layer, expert] and _place(board, layer, expert, must=False):
            pass


def _place(board: Board, layer: int, expert: int, must: bool) -> bool:
    server = board.best_server(layer, expert)
    if server is None and must:
        server = board.make_room(layer, expert)
    if server is not None:
        board.place(layer, expert, server)
    return server is not None


def _budget(board: Board, previous: Plan | None, servers: tuple[str, ...], lost: int) -> int:
    """How many replicas may move for balance alone: free at the start, the joiners' share, a part of what was lost.

    Nothing lost and nobody new: nothing moves, so that planning again gives the same plan.
    """
    if previous is None:
        return 4 * board.layers * board.experts
    joined = [s for s, server in enumerate(servers) if server not in previous.servers]
    due = sum(board.quota[s] * board.layers - board.count_of(s) for s in joined)
    return lost // 4 + int(1.25 * max(due, 0.0))


def _finish(servers: tuple[str, ...], orders: list[LayerOrder], replication: int) -> Plan:
    width = max([replication, *(len(r) for order in orders for r in order.replicas)])
    rows = [[r + [-1] * (width - len(r)) for r in order.replicas] for order in orders]
    ways = np.array([order.ways for order in orders], np.uint8)
    return Plan(servers, np.array(rows, np.int16), ways)
