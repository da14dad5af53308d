"""Options of `bench.multi_gpu`, and what follows from them and from the GPUs at hand."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from bench.engine_processes import Place
from bench.qwen3_shape import ROOM
from moering.checkpoint import Checkpoint
from moering.config import option
from moering.errors import ConfigError, MoeringError

PARTS = ("static", "price", "kills", "at_once", "still", "reload", "servers", "routers")
MIN_APART = 3
"""Expert servers that have a GPU each; where there are fewer, `SHARED` of them share the GPUs for experts."""
SHARED = 3
BLOCK_KEYS = 512


@dataclass(frozen=True)
class Config:
    """The measured price and the measured failure on several GPUs of one host."""

    device: str = option("cuda", "cpu: for trying the bench out at a tiny size", choices=("cpu", "cuda"))
    parts: tuple[str, ...] = option(PARTS, "what to do, in this order, separated by commas")
    layers: int = option(0, "layers of the random checkpoint; the model has 48; 0: what fits")
    fault_layers: int = option(4, "layers while servers die, where several share a GPU")
    streams: tuple[str, ...] = option(("32", "1", "64", "8", "128"), "streams a GPU, in the order of their turn")
    rounds: int = option(3, "rounds of each comparison")
    window_s: float = option(1.0, "seconds of decoding that are measured each time, at least")
    prompt_tokens: int = option(16, "tokens of each prompt")
    fault_streams: int = option(64, "streams while servers die")
    fault_tokens: int = option(48, "tokens of each of their outputs")
    kills: int = option(10, "SIGKILLs of one expert server")
    kills_each: int = option(5, "kills of one account; each is written when it is done")
    stops: int = option(2, "times that a server is stopped, and times that one's GPU hangs")
    load_threads: int = option(6, "experts that each server reads and hashes at once")
    directory: str = option("", "where the checkpoint is, or is written to; empty: in /dev/shm while this runs")
    limit_s: float = option(150.0, "seconds of each part")
    out: str = option("bench-multi-gpu", "directory for multi_gpu.json, the pictures and the logs")

    def __post_init__(self) -> None:
        unknown = sorted(set(self.parts) - set(PARTS))
        if unknown:
            raise ConfigError(f"parts: {', '.join(unknown)} is not among {', '.join(PARTS)}")
        if self.kills_each < 1:
            raise ConfigError("kills_each: at least 1")


@dataclass(frozen=True)
class Gpus:
    """The GPUs of this machine. The first is the router's, the others the expert servers'; one alone is everybody's."""

    names: tuple[str, ...]
    gb: float  # of the smallest
    driver: str

    @property
    def count(self) -> int:
        """How many."""
        return len(self.names)

    @property
    def for_experts(self) -> int:
        """GPUs of expert servers."""
        return max(1, self.count - 1)

    @property
    def servers(self) -> int:
        """Expert servers while some of them die."""
        return self.for_experts if self.for_experts >= MIN_APART else SHARED

    @property
    def apart(self) -> bool:
        """Whether each of those has a GPU of its own."""
        return self.for_experts >= MIN_APART

    @property
    def flags(self) -> list[str]:
        """Of the launcher."""
        return ["--device", "cuda", "--gpus", ",".join(map(str, range(self.count)))]


def find_gpus(device: str) -> Gpus:
    """All of this machine's; two that are none for a run on CPUs. Raises `MoeringError` where there is none."""
    if device == "cpu":
        return Gpus(("CPU", "CPU"), 1.0, "none")
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError) as e:
        raise MoeringError(f"nvidia-smi finds no GPU: {e}") from e
    rows = [[cell.strip() for cell in line.split(",")] for line in lines]
    return Gpus(tuple(r[0] for r in rows), min(float(r[1]) for r in rows) * 2**20 / 1e9, rows[0][2])


@dataclass(frozen=True)
class Setting:
    """A run: its options, its GPUs, its checkpoint, and flags made of them."""

    config: Config
    gpus: Gpus
    checkpoint: Path
    out: Path

    def place(self, gpu: int) -> Place:
        """Of a process on that GPU."""
        return Place(self.checkpoint, self.config.device, "" if self.config.device == "cpu" else str(gpu))

    def engine_flags(self, streams: int, micro_batches: int = 0) -> list[str]:
        """Of a router, or an engine in one process, that so many streams ask at once."""
        block_bytes = 0.0
        if self.config.device == "cuda":
            layers = Checkpoint(self.checkpoint).num_layers
            block_bytes = layers * 4 * 128 * 2 * 2 * BLOCK_KEYS
        cache_mb = max(256, int((streams + 16) * block_bytes / 2**20) + 1)
        return [
            *("--max-num-seqs", str(streams), "--kv-cache-mb", str(cache_mb)),
            *("--max-num-batched-tokens", "1024", "--max-model-len", str(2 * BLOCK_KEYS)),
            *("--micro-batches", str(micro_batches)),
        ]

    def serve_flags(self, servers: int, replication: int, streams: int, micro_batches: int = 0) -> list[str]:
        """Of the launcher."""
        flags = ["--expert-servers", str(servers), "--replication", str(replication), "--max-restart-delay-s", "0"]
        flags += self.gpus.flags if self.config.device == "cuda" else []
        flags += [f"--router-args={' '.join(self.engine_flags(streams, micro_batches))}"]
        return [*flags, f"--expert-server-args={' '.join(self.expert_flags(servers, replication))}"]

    def expert_flags(self, servers: int, replication: int) -> list[str]:
        """Of each of so many expert servers."""
        c = Checkpoint(self.checkpoint)
        room = ROOM if servers > 1 else 1.0
        capacity = int(room * c.num_layers * c.num_experts * replication / servers) + 1
        return ["--capacity", str(capacity), "--load-threads", str(self.config.load_threads)]
