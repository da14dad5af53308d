"""Brings a process into the middle of its drain: told to stop, it drains, and the launcher starts it again."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from tests.faults.arena import Arena
from tests.integration.cluster import SERVERS, wait_for

REPLICAS = 2 * 4 * 8  # of the experts of all layers


def wait_spread(arena: Arena) -> None:
    """Until no server holds more than its share any more, so that a drain gives the others something to load."""

    def held() -> int:
        return sum(p["experts"] for p in arena.processes().values())

    wait_for("two replicas of each expert, and no more", lambda: held() == REPLICAS)


def expert_server(arena: Arena, server_id: str) -> Callable[[], None]:
    """Others are to load what it has, and are held at that; what is returned lets them go on."""
    gates = [arena.hub.arm(s, "loading") for s in SERVERS if s != server_id]
    _tell(arena, server_id)
    wait_for("others begin to load", lambda: any(g.fired.is_set() for g in gates))
    _wait_drains(arena, server_id)

    def go_on() -> None:
        for gate in gates:
            gate.release()

    return go_on


def router(arena: Arena, server_id: str) -> None:
    """It is held with streams in its hands, which it has to finish before it goes."""
    _tell(arena, server_id)
    _wait_drains(arena, server_id)


def gateway(arena: Arena, server_id: str) -> None:
    """It has streams, whose routers are held: its clients wait for their ends, and so does it."""
    said = "requests may finish within"
    before = arena.cluster.logged(said)
    _tell(arena, server_id)
    wait_for(f"{server_id} drains", lambda: arena.cluster.logged(said) > before)


def _tell(arena: Arena, server_id: str) -> None:
    os.kill(arena.hub.pid(server_id), signal.SIGTERM)


def _wait_drains(arena: Arena, server_id: str) -> None:
    wait_for(f"{server_id} drains", lambda: arena.process(server_id)["state"] == "DRAINING")
