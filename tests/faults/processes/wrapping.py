"""What the wrapped processes share: the agent of this process, and forms of a message that nobody should send."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

from moering import transport
from moering.etcd import Etcd, EtcdError
from tests.faults.processes.agent import Agent

GARBAGE = b"\xc1\xff garbage"


def start(own_id: str | None = None) -> Agent:
    """Connect to the hub under the id of the command line; the command line is then what the hub makes of it."""
    argv = sys.argv[1:]
    agent = Agent(own_id or argv[argv.index("--id") + 1])
    sys.argv += agent.argv
    return agent


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a method by `around(original, self, *args)`."""
    original = getattr(owner, name)
    assert original is not None, f"{owner} has no {name} any more: move the fault point"

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(functools.partial(original, self), self, *args, **kwargs)

    setattr(owner, name, wrapped)


def advertise_relay(agent: Agent) -> None:
    """Announce the test's relay instead of the address that is bound, if the hub says so."""
    relay = agent.settings.get("relay")
    if relay is None:
        return
    bind = transport.bind

    def bind_behind_relay(*args: Any, **kwargs: Any) -> str:
        bind(*args, **kwargs)
        return str(relay)

    transport.bind = bind_behind_relay


def points_at_etcd(agent: Agent) -> None:
    """The points *asking*, before a call of `method`, and *missing*, when no answer has come."""

    async def call(go: Any, method: str, request: Any) -> Any:
        agent.hit("asking", method=method)
        try:
            return await go(method, request)
        except EtcdError:
            agent.hit("missing", method=method)
            raise

    wrap(Etcd, "_call", lambda go, etcd, *args: call(go, *args))


def send_spoiled(action: str, send: Callable[[Sequence[Any]], Any], frames: list[Any]) -> Any:
    """Send `frames` in the way of a fault's action."""
    if action == "garbage":
        return send([GARBAGE])
    if action == "twice":
        send(frames)
    return send(frames)
