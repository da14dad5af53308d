"""What the coordinator goes by, and what it decides to do: the edges of `moering.membership`, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Rules:
    """The times and numbers that the coordinator goes by."""

    expert_servers: int = 0  # expected at the start; 0: unknown
    replication: int = 2
    lease_s: float = 10.0
    rejoin_grace_s: float = 5.0
    settle_s: float = 15.0
    allow_inexact: bool = False
    rebalance_s: float = 60.0  # 0: never


@dataclass(frozen=True, slots=True)
class Send:
    """Send `message` to the member with this zmq identity."""

    identity: bytes
    message: Any


@dataclass(frozen=True, slots=True)
class Probe:
    """Ask a server whether it is there, and report with `Membership.probe_result`."""

    server_id: str
    incarnation: int
    address: str


Action = Send | Probe
