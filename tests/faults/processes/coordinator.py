"""`python -m moering.coordinator` with a fault agent.

Points: *replying* with the answer to a member in hand that is not sent, *publishing* with a view in hand that is not
sent to anybody; those at etcd.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from moering import coordinator as product
from moering import transport
from moering.actions import Send
from moering.protocol import View
from tests.faults.processes.agent import Agent
from tests.faults.processes.wrapping import GARBAGE, points_at_etcd, start, wrap


def install(agent: Agent) -> None:
    """Put the points into the product's classes."""
    wrap(product.Coordinator, "_act", lambda go, coordinator, actions: _act(agent, go, coordinator, actions))


def _act(agent: Agent, go: Any, coordinator: Any, actions: Any) -> None:
    views = [a for a in actions if isinstance(a, Send) and isinstance(a.message, View)]
    fault = agent.hit("publishing" if views else "replying") if actions else None
    if fault is None or fault.action == "block":
        return go(actions)
    if fault.action == "twice":
        go(actions)
        return go(actions)
    for action in actions:
        if fault.action == "garbage":
            transport.try_send(coordinator.socket, [action.identity, GARBAGE])
    if fault.action == "wrong shape":
        go([Send(a.identity, dataclasses.replace(a.message, layers=a.message.layers + 1)) for a in views])
    return None


if __name__ == "__main__":
    agent = start("coordinator")
    install(agent)
    points_at_etcd(agent)
    sys.exit(product.main())
