"""`python -m expert_server` with a fault agent.

Points: *joining* before it registers, *loading* before each expert it reads, *received* with a dispatch in hand that is
not computed, *row* for each row of its first layer, *replying* with a reply in hand that is not sent; those
at etcd.
"""

from __future__ import annotations

import hashlib
import os
import time
from typing import Any

import numpy as np

from expert_server import process as product
from expert_server.__main__ import main
from expert_server.service import Service
from moering import process
from moering.expert_frames import Reply
from tests.faults.processes.agent import Agent
from tests.faults.processes.wrapping import GARBAGE, advertise_relay, points_at_etcd, start, wrap

SLOWER = 10
SLOW_AT_LEAST_S = 0.01
"""Of one grouped call of a tiny checkpoint most is overhead: a tenfold of that alone would be seen by nobody."""


def install(agent: Agent) -> None:
    """Put the points into the product's classes."""
    wrap(product.ExpertServer, "_prepare", lambda go, server: (agent.hit("joining"), go()))
    wrap(product.ExpertServer, "_load", lambda go, server, *key: _load(agent, go, server, *key))
    wrap(Service, "open", lambda go, service, *args: go(*args[:3], _slowed(service, args[3]), *args[4:]))
    wrap(Service, "_answer", lambda go, service, group: _answer(agent, go, service, group))
    wrap(Service, "_send", lambda go, service, *args: _send(agent, go, service, *args))


def _load(agent: Agent, go: Any, server: Any, layer: int, expert: int) -> Any:
    fault = agent.hit("loading", state=server.state)
    if fault is not None and fault.action == "full disk":  # the only thing that it writes is its log
        os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
    begun = time.monotonic()
    loaded = go(layer, expert)
    if fault is not None and fault.action == "slow":
        time.sleep((SLOWER - 1) * (time.monotonic() - begun))
    return loaded


def _answer(agent: Agent, go: Any, service: Any, group: Any) -> None:
    service.fault_facts = {"prefill": any(r.message.prefill for r in group.requests)}
    routers = [r.message.router for r in group.requests]
    for router in routers:
        agent.hit("seen", router=router)
    if agent.wants("row"):
        for row in (row for r in group.requests if r.message.layer == 0 for row in r.hidden):
            agent.hit("row", digest=hashlib.sha256(row.tobytes()).hexdigest())
    fault = agent.hit("received", **service.fault_facts)
    service.slow = fault is not None and fault.action == "slow"
    go(group)


def _slowed(service: Any, compute: Any) -> Any:
    def slow_compute(*args: Any) -> None:
        begun = time.monotonic()
        compute(*args)
        if service.slow:
            time.sleep((SLOWER - 1) * max(time.monotonic() - begun, SLOW_AT_LEAST_S / SLOWER))

    return slow_compute


def _send(agent: Agent, go: Any, service: Any, identity: bytes, message: Any, tensor: Any = None) -> None:
    fault = agent.hit("replying", **service.fault_facts) if isinstance(message, Reply) else None
    if fault is None or fault.action == "block":
        go(identity, message, tensor)
    elif fault.action == "garbage":
        service._socket.send_multipart([identity, GARBAGE])
    elif fault.action == "wrong shape":
        _send_misshapen(go, identity, message, tensor, too_narrow=service.fault_facts["prefill"])
    elif fault.action == "twice":
        go(identity, message, tensor)
        go(identity, message, tensor)
    else:
        raise AssertionError(fault.action)


def _send_misshapen(go: Any, identity: bytes, message: Reply, tensor: Any, *, too_narrow: bool) -> None:
    """Too few columns or too many rows. Without `tensor` the rows are in shared memory."""
    columns, rows = message.columns - too_narrow, message.rows + (not too_narrow)
    if tensor is not None:
        tensor = np.resize(tensor, (rows, columns))
    go(identity, message._replace(rows=rows, columns=columns), tensor)


if __name__ == "__main__":
    agent = start()
    advertise_relay(agent)
    install(agent)
    points_at_etcd(agent)
    process.end(main())
