"""`python -m router` with a fault agent.

Points: *joining* before it registers, *loading* before it reads its weights, *received* before the first attention of a
forward, *replying* with a step's tokens in hand that are not sent.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from moering.protocol import Tokens
from router import exchange
from router import process as product
from router.__main__ import main
from router.engine import Engine
from router.frontend import Frontend
from tests.faults.processes.agent import Agent
from tests.faults.processes.wrapping import GARBAGE, advertise_relay, start, wrap

SLOW_S = 0.02  # some ten times what a forward of the tiny checkpoint takes
REFUSED_RETRY_S = 0.5  # instead of five seconds, which each cell with a bad reply would wait to be whole again


def install(agent: Agent) -> None:
    """Put the points into the product's classes."""
    exchange.REFUSED_RETRY_S = REFUSED_RETRY_S
    build = product.build_engine

    def build_engine(*args: Any) -> Any:
        fault = agent.hit("loading")
        if fault is not None and fault.action == "full disk":  # the only thing that it writes is its log
            os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
        return build(*args)

    product.build_engine = build_engine  # type: ignore[assignment]
    wrap(product.Router, "_register", lambda go, router: (agent.hit("joining"), go())[1])
    wrap(Engine, "_to_experts", lambda go, engine, flight: _to_experts(agent, go, engine, flight))
    wrap(Frontend, "_send", lambda go, frontend, *args: _send(agent, go, frontend, *args))


def _to_experts(agent: Agent, go: Any, engine: Any, flight: Any) -> None:
    if flight.layer == 0:
        engine._frontend.fault_facts = {"prefill": flight.prefill}
        fault = agent.hit("received", prefill=flight.prefill)
        if fault is not None and fault.action == "slow":
            time.sleep(SLOW_S)
    go(flight)


def _send(agent: Agent, go: Any, frontend: Any, identity: bytes, message: Any) -> None:
    fault = agent.hit("replying", **frontend.fault_facts) if isinstance(message, Tokens) else None
    if fault is not None and fault.action == "garbage":
        frontend.socket.send_multipart([identity, GARBAGE])
        return
    if fault is not None and fault.action == "twice":
        go(identity, message)
    go(identity, message)


if __name__ == "__main__":
    agent = start()
    advertise_relay(agent)
    install(agent)
    sys.exit(main())
