"""The faults of the kill matrix: each hits at its moment, and is undone once the streams have gone through it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import psutil

from tests.faults.arena import ROUTERS
from tests.faults.matrix import Cell
from tests.faults.moments import Moment
from tests.integration.cluster import wait_for


@contextmanager
def killed(m: Moment) -> Iterator[None]:
    """Also for *same address*: then the victim's successor binds its address again."""
    m.signal(signal.SIGKILL)
    m.release()
    yield


@contextmanager
def told_to_stop(m: Moment) -> Iterator[None]:
    m.signal(signal.SIGTERM)
    m.release()
    yield


@contextmanager
def stopped(m: Moment) -> Iterator[None]:
    """It stands still until the streams have ended; the gateway, until the routers have gone on without it."""
    only_gateway = m.victim == "gateway-0"
    held = m.gate is not None or bool(m.observers)
    notes = [m.arena.hub.arm(r, "replying", "note", skip=3) for r in ROUTERS if only_gateway and held]
    m.signal(signal.SIGSTOP)
    try:
        wait_for("it stands still", lambda: psutil.Process(m.pid).status() == psutil.STATUS_STOPPED)
        m.release()
        for note in notes:
            note.wait_fired()
        if only_gateway:
            m.signal(signal.SIGCONT)
        yield
    finally:
        m.signal(signal.SIGCONT)


@contextmanager
def acted(m: Moment) -> Iterator[None]:
    """The agent has done it, or goes on doing it until the streams have ended."""
    m.release(late=True)
    yield
    m.release()


@contextmanager
def truncated(m: Moment) -> Iterator[None]:
    """Of the victim's own copy of the checkpoint, whose shards it has open."""
    assert m.spare is not None
    for shard in m.spare.checkpoint.glob("*.safetensors"):
        os.truncate(shard, 1000)
    m.release()
    yield


def cut(*directions: str) -> Callable[[Moment], AbstractContextManager[None]]:
    """Of the network in front of the victim."""

    @contextmanager
    def inject(m: Moment) -> Iterator[None]:
        held = m.relay.held
        m.relay.cut(directions)
        try:
            m.release()
            wait_for("something meets the cut", lambda: m.relay.held > held)
            yield
        finally:
            m.relay.heal()

    return inject


INJECTIONS: dict[str, Callable[[Moment], AbstractContextManager[None]]] = {
    "SIGKILL": killed,
    "SIGTERM": told_to_stop,
    "SIGSTOP, SIGCONT": stopped,
    "exit": acted,
    "out of memory": acted,
    "garbage": acted,
    "wrong shape": acted,
    "twice": acted,
    "late": acted,
    "slow": acted,
    "truncated shard": truncated,
    "full disk": acted,
    "same address": killed,
    "cut one way": cut("from"),
    "cut both ways": cut("to", "from"),
}
ENDS = ("SIGKILL", "SIGTERM", "exit", "out of memory", "truncated shard", "same address")
"""After these the victim's process has ended; after all others the same one goes on."""


def ends(cell: Cell) -> bool:
    """Whether the victim's process ends. A gateway lives on without memory for a message: only that is lost to it."""
    return cell.how in ENDS and (cell.who, cell.how) != ("gateway", "out of memory")
