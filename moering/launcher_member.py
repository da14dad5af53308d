"""The launcher as a member of the cluster: it reads in the views what operations want of it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable

from moering.leader import Finder
from moering.lease import LeaseClient
from moering.lease_session import LeaseSession
from moering.process import incarnation
from moering.protocol import Lease, Leave, MemberInfo, Operation, Register, View
from moering.supervisor import Command, Supervisor

logger = logging.getLogger(__name__)

Make = Callable[[str, str], Command | None]
"""(server id, kind) → the command of a process of this machine; None for another machine's."""


class LauncherMember:
    """Starts, ends and lets go processes as the operations of each view say. To be made on the running loop."""

    def __init__(self, server_id: str, coordinator: Finder, supervisor: Supervisor, make: Make) -> None:
        self._own = MemberInfo(
            "launcher", server_id, incarnation(), address="", pid=os.getpid(), state="ONLINE", zone="", capacity=0,
            experts=0,
        )  # fmt: skip
        self._supervisor, self._make = supervisor, make
        self._applied = (0, 0)  # term and epoch
        loop = asyncio.get_running_loop()

        def on_view(view: View) -> None:
            loop.call_soon_threadsafe(self._apply, view)

        session = LeaseSession(self._register, self._lease, on_view, self._on_refused)
        self._client = LeaseClient(coordinator, session)
        self._client.start()

    def close(self) -> None:
        """Leave."""
        self._client.close(Leave(self._own.server_id, self._own.incarnation))

    def _register(self) -> Register:
        return Register(
            self._own, model="", digest="", layers=0, experts=0, fingerprint="", held=b"", view=None
        )  # fmt: skip

    def _lease(self) -> Lease:
        own = self._own
        term, epoch = self._applied
        return Lease(
            own.server_id, own.incarnation, own.state, progress=0, queued=0, suspects=[], term=term, epoch=epoch,
            loads=b"",
        )  # fmt: skip

    def _on_refused(self, reason: str) -> None:
        logger.error("the coordinator refuses this launcher (%s): it will carry out no operation", reason)

    def _apply(self, view: View) -> None:
        for operation in view.operations:
            carry_out(operation, self._supervisor, self._make)
        self._applied = view.term, view.epoch
        self._client.renew()  # a drain waits for the launcher to know


def carry_out(operation: Operation, supervisor: Supervisor, make: Make) -> None:
    """Do what an operation wants of this machine's launcher; doing it again changes nothing."""
    for server_id in operation.retire:
        supervisor.retire(server_id)
    for server_id in operation.stop:
        supervisor.end(server_id)
    for server_id, kind in operation.start.items():
        command = make(server_id, kind)
        if command is not None:
            supervisor.add(command)
