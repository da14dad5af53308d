"""Options of a router."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from moering.cluster_key import KEY_HELP
from moering.config import check_numbers, option
from moering.leader import EMBEDDED, MEMBERSHIP_HELP


@dataclass(frozen=True)
class Config:
    """Run one router: attention, gate, KV cache, batching, sampling, and the dispatch of routed tokens."""

    checkpoint: str = option("", "directory of the checkpoint, the same on all processes (shared storage)")
    join: str = option("tcp://127.0.0.1:7000", "address of the coordinator")
    membership: str = option(EMBEDDED, MEMBERSHIP_HELP)
    bind: str = option("tcp://127.0.0.1:*", "where gateways connect")
    advertise: str = option("", "host that gateways connect to, when it is not the one bound")
    id: str = option("", "name that stays over restarts; default: router- and the host name")
    zone: str = option("", "failure domain")
    threads: int = option(2, "threads of a product of many rows")
    device: str = option("cpu", "where attention is computed and the KV cache lies", choices=("cpu", "cuda"))
    backend: str = option("auto", "CPU arithmetic", choices=("auto", "native", "packed", "portable"))
    max_num_seqs: int = option(64, "sequences that run at once")
    max_num_batched_tokens: int = option(256, "rows of one step")
    max_model_len: int = option(0, "tokens of one sequence; 0: what the checkpoint allows")
    kv_cache_mb: int = option(2048, "memory of the KV cache")
    prefix_caching: bool = option(True, "compute equal prefixes of prompts once, by blocks of 512 tokens, 64 on a GPU")
    micro_batches: int = option(
        0, "micro-batches in flight: while one waits for experts another computes attention; 0: 2 on a GPU, else 1"
    )
    missing_expert_timeout_s: float = option(30.0, "how long a request waits for an expert that no server has")
    drain_timeout_s: float = option(30.0, "how long a router that goes finishes its streams before it hands them over")
    nice: bool = option(False, "start at low priority: others serve meanwhile")
    catch_up_lock: str = option(
        "", "file that routers of this machine lock while they catch up with interrupted streams"
    )
    key: str = option("", KEY_HELP)
    insecure: bool = option(False, "allow --bind on an address that other machines reach without a key")

    def __post_init__(self) -> None:
        """Raises `ConfigError` for what a router cannot work with."""
        check_numbers(
            self,
            positive=("threads", "max_num_seqs", "max_num_batched_tokens", "kv_cache_mb"),
            not_negative=("micro_batches", "max_model_len", "missing_expert_timeout_s", "drain_timeout_s"),
        )

    @property
    def in_flight(self) -> int:
        """Micro-batches in flight."""
        return self.micro_batches or (2 if self.device == "cuda" else 1)

    @property
    def server_id(self) -> str:
        """The name under which this router is known."""
        return self.id or f"router-{socket.gethostname()}"
