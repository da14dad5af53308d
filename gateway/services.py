"""What the handlers of one gateway process share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

from aiohttp import web

from gateway.admin import Admin, admin_keys
from gateway.cluster import Cluster
from gateway.config import Config
from gateway.errors import ApiError
from gateway.journal import Journal
from gateway.metrics import Metrics
from gateway.model import Model
from gateway.router_pool import RouterPool
from gateway.stall import StallGuard
from moering.protocol import Hello, MemberInfo

QUEUE_SHARE = 1 / 8
"""Fewer waiting requests than this share of those allowed are no queue."""


@dataclass(frozen=True)
class Services:
    """Made once at start, closed once at exit. `own` is this process; its state is that of `member`."""

    config: Config
    own: MemberInfo
    model: Model
    journal: Journal
    pool: RouterPool
    cluster: Cluster
    metrics: Metrics
    guard: StallGuard
    admin: Admin

    def not_ready(self) -> str | None:
        """Why requests cannot be accepted now; None when they can."""
        if self.cluster.leaving:
            return "the server is shutting down"
        if not self.cluster.covered:
            return "the model is still being loaded"
        if not self.pool.connected:
            return "no router is connected"
        return None

    def member(self) -> MemberInfo:
        """This process as others should see it now."""
        state = "DRAINING" if self.cluster.leaving else "ONLINE" if self.cluster.covered else "JOINING"
        return replace(self.own, state=state)

    def admit(self, choices: int) -> None:
        """Raise 503 while loading or draining, and 429 when too much is under way.

        A router that is lost for a moment is no reason to refuse: requests are held until one is there.
        """
        if self.cluster.draining or not self.cluster.covered:
            raise ApiError(503, f"{self.not_ready()}; try again", code="not_ready", retry_after_s=5)
        if len(self.journal) + choices > self.config.max_requests:
            raise ApiError(429, "too many requests are under way; try again", code="queue_full", retry_after_s=1)
        if self._falls_behind():
            raise ApiError(429, "requests wait too long for their turn; try later", code="queue_slow", retry_after_s=5)

    def _falls_behind(self) -> bool:
        """Whether there is a queue that does not move: what the living servers can compute is less than what is asked.

        A few that wait long, for a long prompt or an expert, are no queue.
        """
        waiting = [r for r in self.journal.records() if not r.emitted]
        if len(waiting) <= self.config.max_requests * QUEUE_SHARE:
            return False
        since_s = min(r.deadline for r in waiting) - self.config.request_timeout_s
        return asyncio.get_running_loop().time() - since_s > self.config.max_queue_wait_s


def make_services(config: Config, model: Model, own: MemberInfo) -> Services:
    """Wire everything up; must run on the event loop. Nothing is connected yet."""
    journal, metrics, cluster = Journal(), Metrics(), Cluster()
    hello = Hello(own.server_id, own.incarnation, model.checkpoint_name, "")
    pool, guard = RouterPool(journal, hello), StallGuard(config.stall_timeout_s)
    metrics.expose(
        gauges=lambda: {
            "num_requests_running": sum(bool(r.emitted) for r in journal.records()),
            "num_requests_waiting": sum(not r.emitted for r in journal.records()),
            "requests_held": pool.held,
            "routers_connected": pool.connected,
            **cluster.gauges(),
            **{f"router_{name}": value for name, value in pool.router_gauges().items()},
        },
        counters=lambda: {
            "failovers": pool.failovers,
            "dropped_tokens": journal.dropped_tokens,
            "stalled_clients": guard.cut_count,
        },
        router_counters=lambda: {router: stats.counters for router, stats in pool.living_stats().items()},
        by_layer=lambda: {
            "expert_load_max_over_mean": {r: s.expert_balance for r, s in pool.living_stats().items()},
            "server_load_max_over_mean": {r: s.server_balance for r, s in pool.living_stats().items()},
        },
    )
    return Services(config, own, model, journal, pool, cluster, metrics, guard, Admin(admin_keys(config)))


SERVICES = web.AppKey("services", Services)
