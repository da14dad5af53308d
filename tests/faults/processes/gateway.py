"""`python -m gateway` with a fault agent.

Points: *joining* before it registers, *received* with a router's tokens in hand that are not in the journal, *replying*
with events in hand that are not written to the client.
"""

from __future__ import annotations

import sys
from typing import Any

from gateway import __main__ as product
from gateway.router_pool import RouterPool
from gateway.sse import EventStream
from moering.lease import LeaseClient
from moering.protocol import Tokens
from tests.faults.processes.agent import Agent
from tests.faults.processes.wrapping import start, wrap


def install(agent: Agent) -> None:
    """Put the points into the product's classes."""
    wrap(LeaseClient, "run", lambda go, client: (agent.hit("joining"), go())[1])
    wrap(RouterPool, "_receive", lambda go, pool, *args: _receive(agent, go, *args))
    wrap(EventStream, "write", lambda go, stream, data: _write(agent, go, data))


def _receive(agent: Agent, go: Any, link: Any, message: Any) -> None:
    if isinstance(message, Tokens):
        agent.hit("received", prefill=any(t.position == 0 for t in message.tokens))
    go(link, message)


async def _write(agent: Agent, go: Any, data: bytes) -> None:
    agent.hit("replying", prefill=False)  # it blocks the loop: the whole gateway stands still, as it should
    await go(data)


if __name__ == "__main__":
    agent = start()
    install(agent)
    sys.exit(product.main())
