"""Which server each expert's rows go to now, by the plan and by what is believed of the servers."""

from __future__ import annotations

import numpy as np

from moering.protocol import View
from router.choose import GONE, LATE, Health, choose, rank_all


class Routes:
    """The plan's replicas and everybody's health, and the choice that follows from both."""

    def __init__(self) -> None:
        self.health: dict[str, Health] = {}
        self.servers: list[str] = []
        self._routing = np.full((0, 0, 1), -1, np.int16)
        self._absent = np.zeros((0, 0, 1), bool)
        self._route = np.full((0, 0), -1, np.int16)
        self._valid_until_s = 0.0

    def follow(self, view: View) -> None:
        """Go by this plan from now on."""
        if view.layers:
            shape = (view.layers, view.experts, view.width)
            self._routing = np.frombuffer(view.routing, "<i2").reshape(shape)
        else:  # a coordinator that has met no expert server yet plans nothing: all is nowhere
            self._routing = np.full_like(self._routing, -1)
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
            self._route = choose(self._routing, self._absent, rank_all(self.servers, self.health, now_s))
            bans = [h.banned_until_s for h in self.health.values() if h.banned_until_s > now_s]
            self._valid_until_s = min(bans, default=float("inf"))
        return self._route

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
