"""What expert servers should hold, what they do hold, and what may be routed to: the two steps of every move.

Pure: no socket, no clock. A move changes `target` first. When the server reports that it holds the replica and is
ONLINE, `routing` changes. A replica that the plan no longer wants stays in `target` until every leased router has
acknowledged an epoch whose routing does without it, so a server simply drops what is not in `target`.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moering import ring
from moering.popularity import ranks
from moering.protocol import View
from moering.tables import Pairs, Replicas, Tables, columns, pack, pick, ways_of, widen

SERVING = ("ONLINE", "DRAINING")


@dataclass(slots=True, eq=False)
class Server:
    """An expert server. `gone`: dead, but its share is kept for it until the grace time ends; it holds nothing."""

    zone: str
    capacity: int
    state: str
    held: Pairs  # [layers, experts]
    last_used: npt.NDArray[np.int64]  # [layers, experts]: the last epoch whose routing names the replica, 0 for none
    urgent: Pairs  # [layers, experts]: orphans that it should load before everything else
    gone: bool = False


class Placement:
    """All expert servers of one model and the plan for them."""

    def __init__(self, layers: int, experts: int, replication: int) -> None:
        self.layers, self.experts, self.replication = layers, experts, replication
        self.servers: dict[str, Server] = {}
        self.plan: ring.Plan | None = None
        self.popularity: npt.NDArray[np.float64] | None = None  # tokens per [layer, expert]
        self.popularity_known = False  # enough was counted for plans to go by it
        self.doubtful: AbstractSet[str] = frozenset()
        """Look dead without proof: theirs is loaded elsewhere too, but nothing is taken from them."""
        self._digests: npt.NDArray[np.uint64] = np.zeros((layers, experts), np.uint64)
        self._digest_known = self._none()
        self._was_served = self._none()

    # --- servers and what they hold ---

    def put(self, server_id: str, zone: str, capacity: int, state: str, held: Pairs | None) -> None:
        """A server joined, came back or changed. `held` None keeps what is known of it."""
        server = self.servers.get(server_id)
        if server is None:
            server = self.servers[server_id] = Server(
                zone,
                capacity,
                state,
                self._none(),
                np.zeros((self.layers, self.experts), np.int64),
                self._none(),
            )
        server.zone, server.capacity, server.state, server.gone = zone, capacity, state, False
        if held is not None:
            server.held = held

    def hold(self, server_id: str, held: Pairs) -> int:
        """A server reports what it holds; how many experts of it are new."""
        server = self.servers[server_id]
        new, server.held = int((held & ~server.held).sum()), held
        return new

    def lose(self, server_id: str, *, keep_share: bool) -> None:
        """A server died. With `keep_share` the plan goes on to count on it."""
        if keep_share:
            server = self.servers[server_id]
            server.gone, server.held, server.urgent = True, self._none(), self._none()
            server.last_used[:] = 0
        else:
            self.servers.pop(server_id, None)

    def unpack(self, held: bytes) -> Pairs | None:
        """The pairs of a `Held` message; None where they are not sorted pairs of this model."""
        keys = np.frombuffer(held, "<u4") if len(held) % 4 == 0 else None
        if keys is None or (np.diff(keys.astype(np.int64)) <= 0).any():
            return None
        layers, experts = keys >> 16, keys & 0xFFFF
        if (layers >= self.layers).any() or (experts >= self.experts).any():
            return None
        pairs = self._none()
        pairs[layers, experts] = True
        return pairs

    def differing(self, held: Pairs, digests: bytes) -> tuple[int, int] | None:
        """The first expert whose content differs from the replica seen first; new ones are remembered."""
        values = np.frombuffer(digests, "<u8")
        wrong = held & self._digest_known
        wrong[held] &= self._digests[held] != values
        if wrong.any():
            layer, expert = np.argwhere(wrong)[0].tolist()
            return layer, expert
        self._digests[held] = values
        self._digest_known |= held
        return None

    # --- planning ---

    def replan(self) -> None:
        """Plan anew for the servers that are here or awaited, starting from what is planned and held."""
        self.plan = self._plan(self._members())

    @property
    def at_rest(self) -> bool:
        """Whether all servers are ONLINE and every replica of the plan, and no other, is there."""
        servers = tuple(sorted(self.servers))
        here = all(s.state == "ONLINE" and not s.gone for s in self.servers.values())
        return here and self.plan is not None and np.array_equal(self._stack(servers, "held"), self._mask(servers))

    def levelled(self, moves: int) -> ring.Plan:
        """The plan for the same servers with their loads levelled, at most `moves` replicas moved for that alone."""
        return self._plan(self._members(), moves)

    def assign_orphans(self) -> None:
        """Give experts that no server serves to servers that are ONLINE, without waiting for the dead.

        An expert that was never served yet, as at the start, is left to the joining servers that it is planned for.
        """
        servers = tuple(sorted(self.servers))
        served = np.asarray((self._serving(servers) & self._sure(servers)).any(axis=0), np.bool_)
        urgent = self._none()
        for server in self.servers.values():
            server.urgent = server.urgent & ~served
            urgent = urgent | server.urgent
        able = [m for m in self._able() if m.state == "ONLINE"]
        orphans = ~served & ~urgent & (self._was_served | ~self._coming())
        if self.plan is None or not able or not orphans.any():
            return
        plan = self._plan(able)
        for server_id in plan.servers:
            self.servers[server_id].urgent = self.servers[server_id].urgent | (plan.mask_of(server_id) & orphans)
        if any(self._share(m.server_id) > m.capacity for m in able):
            # Memory is so short that redundant copies must go: the dead ones' shares are not kept.
            self.plan = self._plan([m for m in self._members() if not self.servers[m.server_id].gone])

    def planned_survivable(self) -> int:
        """The failures of expert servers that are survived once the plan is carried out; -1 without a plan."""
        return -1 if self.plan is None else self._survivable(self.plan)

    def refusal_without(self, leaving: AbstractSet[str], floor: int) -> str | None:
        """Why these servers cannot be spared, if `floor` failures have to be survived without them."""
        staying = [m for m in self._members() if m.server_id not in leaving and m.state != "DRAINING"]
        emptied = all(self.servers[i].state == "DRAINING" for i in leaving if i in self.servers)
        plan = self.plan if emptied else self._plan(staying)  # a draining server has no part in the plan already
        survivable = -1 if plan is None else self._survivable(plan)
        if survivable >= floor:
            return None
        who = ", ".join(sorted(leaving & self.servers.keys()))
        others = f"the other {len(staying)} expert servers"
        if survivable < 0:
            return f"without {who}, {others} have no room for every expert"
        return f"without {who}, {others} would survive {survivable} failures, not the {floor} promised"

    def _survivable(self, plan: ring.Plan) -> int:
        return ring.failures_survivable(plan.replicas, plan.servers, {i: s.zone for i, s in self.servers.items()})

    def _share(self, server_id: str) -> int:
        planned = self._none() if self.plan is None else self.plan.mask_of(server_id)
        return int((planned | self.servers[server_id].urgent).sum())

    def restore(self, view: View) -> None:
        """Go on from a view of an earlier coordinator: its target is the plan, its routing is in use."""
        shape = (view.layers, view.experts, view.width)
        target = np.frombuffer(view.target, "<i2").reshape(shape).astype(np.int16)
        routing = np.frombuffer(view.routing, "<i2").reshape(shape).astype(np.int16)
        self.plan = ring.Plan(tuple(view.servers), target, ways_of(view))
        self._note_use(tuple(view.servers), routing, view.epoch)

    def _members(self) -> list[ring.Member]:
        return [
            ring.Member(i, s.capacity, s.zone, "ONLINE" if s.gone else s.state) for i, s in sorted(self.servers.items())
        ]

    def _able(self) -> list[ring.Member]:
        """Those who are neither dead nor in doubt."""
        return [m for m in self._members() if not self.servers[m.server_id].gone and m.server_id not in self.doubtful]

    def _plan(self, members: list[ring.Member], moves: int = 0) -> ring.Plan:
        shape = self.replication, self.layers, self.experts
        popularity = self.popularity if self.popularity_known else None
        return ring.plan(self._previous(), members, popularity, *shape, moves)

    def _previous(self) -> ring.Plan | None:
        """The plan, and for experts whose planned replicas are not all up the other holders, who need not load."""
        if self.plan is None:
            return None
        servers = tuple(sorted(self.servers))
        planned, complete = self._planned(servers)
        extra = (self._stack(servers, "held") | self._stack(servers, "urgent")) & ~self._mask(servers) & ~complete
        known = [s for s, i in enumerate(servers) if i in self.plan.servers or extra[s].any()]
        number = np.full(len(servers) + 1, -1, np.int16)  # a joiner must not look as if it had been in the plan
        number[known] = np.arange(len(known))
        rows = number[np.concatenate([planned, columns(extra)], axis=2)]
        return ring.Plan(tuple(servers[s] for s in known), pack(rows), self.plan.ways)

    def _coming(self) -> Pairs:
        """The experts that a joining server is going to hold."""
        coming = self._none()
        for server_id, server in self.servers.items():
            if server.state == "JOINING" and not server.gone and self.plan is not None:
                coming |= self.plan.mask_of(server_id)
        return coming

    # --- what members see ---

    def tables(self, acknowledged: int | None) -> Tables:
        """Routing and target now. `acknowledged`: the oldest epoch that a leased router routes by, None without one."""
        servers = tuple(sorted(self.servers))
        planned, complete = self._planned(servers)
        mask, serving = self._mask(servers), self._serving(servers)
        up = np.where(pick(serving, planned), planned, np.int16(-1))
        routing = pack(np.concatenate([up, columns(serving & ~mask & ~complete)], axis=2))
        kept = self._stack(servers, "urgent")
        for s, server_id in enumerate(servers):
            server = self.servers[server_id]
            kept[s] |= (routing == s).any(axis=2)
            if acknowledged is not None:
                kept[s] |= server.held & (server.last_used >= max(acknowledged, 1))
        target = pack(np.concatenate([planned, columns(kept & ~mask)], axis=2))
        width = max(self.replication, routing.shape[2], target.shape[2])
        routing, target = widen(routing, width), widen(target, width)
        zones = {i: s.zone for i, s in self.servers.items()}
        survivable = ring.failures_survivable(routing, servers, zones)
        under = ring.under_target(routing, self.replication)
        restorable = ring.failures_restorable(self._able(), self.replication, self.layers * self.experts)
        popularity = b"" if self.popularity is None else ranks(self.popularity)
        ways = np.ones((self.layers, self.experts), np.uint8) if self.plan is None else self.plan.ways
        return Tables(
            servers, routing, target, survivable, ring.orphans(routing), under, restorable, popularity, ways
        )  # fmt: skip

    def published(self, tables: Tables, epoch: int) -> None:
        """Members are told `tables` as `epoch`: from now on routers may use its routing."""
        self._note_use(tables.servers, tables.routing, epoch)

    def _note_use(self, servers: tuple[str, ...], routing: Replicas, epoch: int) -> None:
        self._was_served |= (routing >= 0).any(axis=2)
        for index, server_id in enumerate(servers):
            if server_id in self.servers:
                self.servers[server_id].last_used[(routing == index).any(axis=2)] = epoch

    # --- arrays over servers ---

    def _none(self) -> Pairs:
        return np.zeros((self.layers, self.experts), np.bool_)

    def _planned(self, servers: tuple[str, ...]) -> tuple[Replicas, Pairs]:
        """The plan's replicas as indices into `servers`, and which experts have all of theirs serving without doubt."""
        if self.plan is None:
            return np.full((self.layers, self.experts, 1), -1, np.int16), self._none()
        index = {i: n for n, i in enumerate(servers)}
        number = np.array([index.get(i, -1) for i in self.plan.servers] + [-1], np.int16)
        planned = number[self.plan.replicas]
        wanted = planned >= 0
        up = ~wanted | pick(self._serving(servers) & self._sure(servers), planned)
        return planned, np.asarray(up.all(axis=2) & wanted.any(axis=2), np.bool_)

    def _mask(self, servers: tuple[str, ...]) -> Pairs:
        """Which replicas are in the plan: bool [servers, layers, experts]."""
        mask = np.zeros((len(servers), self.layers, self.experts), np.bool_)
        for s, server_id in enumerate(servers):
            if self.plan is not None:
                mask[s] = self.plan.mask_of(server_id)
        return mask

    def _serving(self, servers: tuple[str, ...]) -> Pairs:
        """Which replicas may be routed to: bool [servers, layers, experts]."""
        held = self._stack(servers, "held")
        up = [not self.servers[i].gone and self.servers[i].state in SERVING for i in servers]
        return held & np.array(up, np.bool_).reshape(-1, 1, 1)

    def _sure(self, servers: tuple[str, ...]) -> Pairs:
        return np.array([i not in self.doubtful for i in servers], np.bool_).reshape(-1, 1, 1)

    def _stack(self, servers: tuple[str, ...], field: str) -> Pairs:
        stack = np.zeros((len(servers), self.layers, self.experts), np.bool_)
        for s, server_id in enumerate(servers):
            stack[s] = getattr(self.servers[server_id], field)
        return stack
