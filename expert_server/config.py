"""Options of an expert server."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from moering.cluster_key import KEY_HELP
from moering.config import check_numbers, option
from moering.errors import ConfigError
from moering.leader import EMBEDDED, MEMBERSHIP_HELP


@dataclass(frozen=True)
class Config:
    """Run one expert server."""

    checkpoint: str = option("", "directory of the checkpoint, the same on all processes (shared storage)")
    join: str = option("tcp://127.0.0.1:7000", "address of the coordinator")
    membership: str = option(EMBEDDED, MEMBERSHIP_HELP)
    bind: str = option("tcp://127.0.0.1:*", "where routers connect")
    advertise: str = option("", "host that routers connect to, when it is not the one bound")
    id: str = option("", "name that stays over restarts; default: expert- and the host name")
    zone: str = option("", "failure domain: replicas of an expert are spread over zones first")
    threads: int = option(1, "threads of one product")
    device: str = option("cpu", "where experts are held and computed", choices=("cpu", "cuda"))
    capacity: int = option(0, "experts that fit in memory; 0: what fits in 80 % of the memory that is free at start")
    host_replicas: int = option(0, "further experts in pinned host memory, ready for the GPU (with --device cuda)")
    backend: str = option("auto", "CPU arithmetic", choices=("auto", "native", "packed", "portable"))
    credit_rows: int = option(4096, "rows that one router may have outstanding here")
    load_threads: int = option(1, "experts read and hashed at once while loading; more than 1 needs cores to spare")
    load_share: float = option(
        0.0,
        "share of a core that loading may take beside traffic, up to 1; 0: 0.025 for each core, at most 0.5",
    )
    load_mb_per_s: float = option(0.0, "limit of reading from the checkpoint, but for orphans; 0: none")
    nice: bool = option(True, "start at low priority until online, so that joining does not slow the others")
    drain_timeout_s: float = option(30.0, "after SIGTERM, how long others may take to load what is here")
    key: str = option("", KEY_HELP)
    insecure: bool = option(False, "allow --bind on an address that other machines reach without a key")

    def __post_init__(self) -> None:
        """Raises `ConfigError` for what a server cannot work with."""
        check_numbers(
            self, positive=("threads", "credit_rows", "load_threads"), not_negative=("capacity", "drain_timeout_s")
        )
        if not 0 <= self.load_share <= 1 or not self.load_mb_per_s >= 0:
            raise ConfigError("load_share must be from 0 to 1, and load_mb_per_s not negative")
        if self.host_replicas < 0 or (self.host_replicas and self.device != "cuda"):
            raise ConfigError("host_replicas are for --device cuda, and not negative")

    def share_of_core(self) -> float:
        """What background loading may take of a core, in (0, 1]."""
        return self.load_share or min(0.5, 0.025 * (os.cpu_count() or 1))

    def expert_s(self, expert_bytes: int) -> float:
        """Seconds that an expert takes at least, by the limit of reading."""
        return expert_bytes / (self.load_mb_per_s * 1e6) if self.load_mb_per_s else 0.0

    @property
    def server_id(self) -> str:
        """The name under which this server is known."""
        return self.id or f"expert-{socket.gethostname()}"
