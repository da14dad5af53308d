"""This process as a member of the cluster: the lease thread's calls, brought to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from gateway.services import Services
from moering.drain import told_to_drain
from moering.leader import finder
from moering.lease import LeaseClient
from moering.lease_session import LeaseSession
from moering.protocol import Lease, Leave, Register, View

logger = logging.getLogger(__name__)

TICK_S = 0.5


def apply_view(services: Services, view: View) -> None:
    """Take a newer view, on the event loop."""
    was_covered = services.cluster.covered
    services.cluster.apply(view)
    if services.cluster.covered and not was_covered:
        logger.info("all experts are being served (epoch %d)", view.epoch)
    services.pool.update(view.members)
    if told_to_drain(view, services.own):
        services.cluster.told_to_leave.set()


@contextlib.asynccontextmanager
async def joined(services: Services, on_refused: Callable[[], None]) -> AsyncIterator[None]:
    """Hold a lease from the coordinator and apply its views. `on_refused` is called on the event loop."""
    loop = asyncio.get_running_loop()
    progress = _Progress()
    own = services.own

    def register() -> Register:
        name = services.model.checkpoint_name
        return Register(
            services.member(), name, digest="", layers=0, experts=0, fingerprint="", held=b"", view=None
        )  # fmt: skip

    def lease() -> Lease:
        view = services.cluster.view
        term, epoch = (0, 0) if view is None else (view.term, view.epoch)
        state, queued = services.member().state, len(services.journal)
        return Lease(
            own.server_id, own.incarnation, state, progress.turns, queued, suspects=[], term=term, epoch=epoch,
            loads=b"",
        )  # fmt: skip

    def refused(reason: str) -> None:
        logger.error("the coordinator refuses this gateway: %s", reason)
        loop.call_soon_threadsafe(on_refused)

    def on_view(view: View) -> None:
        loop.call_soon_threadsafe(apply_view, services, view)

    def on_message(message: Any) -> None:
        loop.call_soon_threadsafe(services.admin.take, message)

    coordinator = finder(services.config.join, services.config.membership)
    client = LeaseClient(coordinator, LeaseSession(register, lease, on_view, refused, on_message))
    client.start()
    services.admin.send = client.send
    ticker = asyncio.create_task(progress.run())
    try:
        yield
    finally:
        ticker.cancel()
        await loop.run_in_executor(None, client.close, Leave(own.server_id, own.incarnation))


class _Progress:
    """Counts turns of the event loop, so that the coordinator sees one that hangs."""

    def __init__(self) -> None:
        self.turns = 0

    async def run(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.turns += 1
