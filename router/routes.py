"""Which server each expert's rows go to now, by the plan and by what is believed of the servers."""

from __future__ import annotations

import numpy as np

from moering.protocol import View
from moering.tables import ways_of
from router.choose import choose
from router.health import GONE, LATE, Health, rank_all
from router.packing import Packet, pack
from router.sharing import Shares, find_shares, pack_shared
from router.work import Work


class Routes:
    """The plan's replicas and everybody's health, and the choice that follows from both."""

    def __init__(self) -> None:
        self.health: dict[str, Health] = {}
        self.servers: list[str] = []
        self._routing = np.full((0, 0, 1), -1, np.int16)
        self._absent = np.zeros((0, 0, 1), bool)
        self._route = np.full((0, 0), -1, np.int16)
        self._valid_until_s = 0.0
        self._ways = np.ones((0, 0), np.uint8)
        self._shares: dict[int, Shares] = {}
        self._turns: dict[int, int] = {}  # by layer; one for all would give every second layer the same replica always

    def follow(self, view: View) -> None:
        """Go by this plan from now on."""
        if view.layers:
            shape = (view.layers, view.experts, view.width)
            self._routing = np.frombuffer(view.routing, "<i2").reshape(shape)
            self._ways = ways_of(view)
        else:  # a coordinator that has met no expert server yet plans nothing: all is nowhere
            self._routing = np.full_like(self._routing, -1)
            self._ways = np.ones_like(self._ways)
        self._absent = np.zeros(self._routing.shape, bool)
        self.servers = list(view.servers)
        self.changed()

    def lacks(self, server: str, layer: int, experts: np.ndarray) -> None:
        """It said that it does not have these; until the next plan they are looked for elsewhere."""
        if server in self.servers:
            index = self.servers.index(server)
            self._absent[layer, experts] |= self._routing[layer, experts] == index
        self.changed()

    def changed(self) -> None:
        """Somebody's health has changed."""
        self._valid_until_s = 0.0

    def now(self, now_s: float) -> np.ndarray:
        """The server of each expert, an index into `servers`; -1: none. int16 [layers, experts]."""
        if now_s >= self._valid_until_s:
            ranks = rank_all(self.servers, self.health, now_s)
            self._route = choose(self._routing, self._absent, ranks)
            self._shares = find_shares(self._routing, self._absent, ranks, self._ways)
            bans = [h.banned_until_s for h in self.health.values() if h.banned_until_s > now_s]
            self._valid_until_s = min(bans, default=float("inf"))
        return self._route

    def packets(self, work: Work, slots: np.ndarray | None, now_s: float) -> list[Packet]:
        """These slots of a work (None: all) by the servers that they go to now. There must be a plan."""
        layer, route = work.layer, self.now(now_s)[work.layer]
        shares = self._shares.get(layer)
        if not shares:
            return pack(slots, work.experts, route, work.top_k)
        turn = self._turns[layer] = self._turns.get(layer, -1) + 1
        return pack_shared(slots, work.experts, route, work.top_k, shares, turn)

    @property
    def in_use(self) -> list[str]:
        """The servers that the plan sends any rows to, health aside."""
        return [self.servers[s] for s in np.unique(self._routing).tolist() if s >= 0]

    def around(self, layer: int, server: str, now_s: float) -> np.ndarray:
        """The same for one layer without `server` and without any that is late: int16 [experts]."""
        ranks = rank_all(self.servers, self.health, now_s)
        ranks[ranks >= LATE] = GONE
        if server in self.servers:
            ranks[self.servers.index(server)] = GONE
        return choose(self._routing[layer][None], self._absent[layer][None], ranks)[0]

    def only(self, layer: int, server: str) -> np.ndarray:
        """`server` for the experts of a layer that it holds, -1 for others: int16 [experts]."""
        index = self.servers.index(server)
        holds = ((self._routing[layer] == index) & ~self._absent[layer]).any(axis=1)
        return np.where(holds, index, -1).astype(np.int16)
