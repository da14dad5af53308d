"""An expert server: the real residency, grouping and reading of the plan around arithmetic that costs nothing."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from expert_server import batching
from expert_server.batching import Group, Request
from expert_server.loader import REPORT_S, targets
from expert_server.residency import Residency
from moering.expert_frames import Dispatch, Reply
from moering.protocol import Failed, Held, Hello, NotHere, View, Welcome
from tests.simulation.arithmetic import P, coefficients
from tests.simulation.member import Member
from tests.simulation.network import End

if TYPE_CHECKING:
    from tests.simulation.cluster import Cluster

PROBE_S = 0.3  # import and self-probe of a starting process


class ExpertServer(Member):
    """Serves, loads and drops on virtual time."""

    kind = "expert-server"

    def __init__(self, cluster: Cluster, server_id: str, incarnation: int) -> None:
        super().__init__(cluster, server_id, incarnation)
        self.state = "JOINING"
        self.residency = Residency()
        self.slowness = 1.0
        size = cluster.size
        self._limits = batching.Limits(size.layers, size.experts, 1, size.max_pairs)
        self._a, self._b = coefficients(size.layers, size.experts)
        self._waiting: list[tuple[End, Request]] = []
        self._busy = False
        self._loading: Iterator[float] | None = None
        self.after(PROBE_S, self.join)

    # --- membership ---

    @property
    def capacity(self) -> int:
        """Replicas that fit."""
        return self.cluster.size.capacity

    def held(self) -> bytes:
        """Packed keys."""
        return self.residency.report()[0]

    def drain(self) -> None:
        """Ask to be emptied."""
        if self.state == "ONLINE":
            self.state = "DRAINING"
            self.renew()

    def undrain(self) -> None:
        """Take part again."""
        if self.state == "DRAINING":
            self.state = "ONLINE"
            self.renew()

    def _report(self) -> None:
        self.session.send(Held(self.name, self.incarnation, *self.residency.report()))
        self.renew()

    # --- loading; the order of things is that of `expert_server.loader.Loader` ---

    def view_changed(self, view: View) -> None:
        """Follow the plan."""
        if self._loading is None:
            self._load_next(self._load(), idle=True)

    def _load_next(self, steps: Iterator[float], *, idle: bool = False) -> None:
        if idle:
            self._loading = steps
        pause_s = next(steps, None)
        if pause_s is None:
            self._loading = None
        else:
            self.after(pause_s * self.slowness, self._load_next, steps)

    def _load(self) -> Iterator[float]:
        """Bring memory in line with the newest view; yields how long each step takes."""
        done: View | None = None
        while done is not self.view:
            done = self.view
            if self.name not in done.servers:
                continue
            finished = yield from self._reconcile(done)
            if finished and self.state == "JOINING":
                self.state = "ONLINE"
                self._report()
                yield from self._reconcile(done)

    def _reconcile(self, view: View) -> Generator[float, None, bool]:
        online = self.state != "JOINING"
        given = targets(view, self.name)
        held = self.residency.keys()
        for key in sorted(held - given.wanted):
            self.cluster.oracle.dropping(self, key)
            self.residency.drop(key)
        if held - given.wanted:
            self._report()
        missing = given.in_order(given.needed(online) - held)
        reported_s = self.world.now_s
        for n in range(1, len(missing) + 1):
            newest = targets(self.view, self.name)
            if newest.asks_for_more_than(given):
                self._report()
                return False
            given = newest
            missing[n - 1 :] = given.in_order(missing[n - 1 :])
            key = missing[n - 1]
            load_s = self.cluster.load_s()
            yield load_s
            layer, expert = key
            weights = int(self._a[layer, expert]), int(self._b[layer, expert])
            self.residency.add(key, weights, b"%08d" % (layer << 16 | expert))
            waited_for = n < len(missing) and given.urgency(key) > given.urgency(missing[n])
            if n == len(missing) or (online and (waited_for or self.world.now_s - reported_s > REPORT_S)):
                self._report()
                reported_s = self.world.now_s
            if online and key not in given.orphans:
                yield load_s
        return True

    # --- serving ---

    def received(self, end: End, message: Any) -> None:
        """A control message, or one of a router: (message, tensor)."""
        if self.is_control(end):
            super().received(end, message)
            return
        message, tensor = message
        if isinstance(message, Hello):
            size = self.cluster.size
            end.send((Welcome(self.name, self.incarnation, size.credit_rows, size.max_pairs), None))
        elif isinstance(message, Dispatch):
            request = batching.parse(b"", message, tensor, self._limits)
            if isinstance(request, str):
                end.send((Failed(f"{message.router}/{message.seq}", 0, "bad_request", request), None))
                return
            self._waiting.append((end, request))
            self.queued = len(self._waiting)
            if not self._busy:
                self._turn()

    def _turn(self) -> None:
        """One turn of the compute thread: take what is there, group it, compute, answer."""
        self.progress += 1
        self._busy = bool(self._waiting)
        if not self._busy:
            self.queued = 0
            return
        waiting, self._waiting = self._waiting, []
        ends = {id(request): end for end, request in waiting}
        replies: list[tuple[End, Reply, np.ndarray]] = []
        for group in batching.group([request for _, request in waiting], self.cluster.size.max_pairs):
            self._answer(group, ends, replies)
        self.after(self.cluster.compute_s() * self.slowness, self._reply, replies)

    def _answer(self, group: Group, ends: dict[int, End], replies: list) -> None:
        layer = group.requests[0].message.layer
        found = self.residency.find(layer, group.experts)
        missing = {e for e, expert in zip(group.experts, found, strict=True) if expert is None}
        if missing:
            rest = []
            for r in group.requests:
                if missing.isdisjoint(r.experts):
                    rest.append(r)
                else:
                    epoch = 0 if self.view is None else self.view.epoch
                    ends[id(r)].send((NotHere(r.message.router, r.message.seq, self.incarnation, epoch), None))
            for smaller in batching.group(rest, self.cluster.size.max_pairs):
                self._answer(smaller, ends, replies)
            return
        hidden = np.concatenate([r.hidden for r in group.requests])[:, 0].astype(np.int64)
        experts = np.repeat(group.experts, group.counts)
        chosen = hidden if group.rows is None else hidden[group.rows]
        out = (self._a[layer, experts] * chosen + self._b[layer, experts]) % P
        parts = batching.split(group, out.astype(np.float32)[:, None])
        for r, part in zip(group.requests, parts, strict=True):
            m = r.message
            replies.append((ends[id(r)], Reply(m.router, m.seq, self.incarnation, 0, "float32", len(part), 1), part))

    def _reply(self, replies: list[tuple[End, Reply, np.ndarray]]) -> None:
        for end, reply, rows in replies:
            end.send((reply, rows))
        self._turn()
