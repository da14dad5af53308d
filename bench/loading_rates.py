"""How fast experts are loaded, beside plain sequential reads of the same files: GB/s, warm and with a dropped cache."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from expert_server.backend import Backend, make_backend
from moering.checkpoint import Checkpoint

READ_BYTES = 8 << 20
GB = 1e9


def read_file(path: Path) -> int:
    """Read a file from its begin to its end into one buffer; returns the bytes."""
    buffer, size = bytearray(READ_BYTES), 0
    with path.open("rb", buffering=0) as file:
        while got := file.readinto(buffer):
            size += got
    return size


class Loading:
    """One checkpoint, read in three ways: its files from end to end, its experts, and its experts until ready."""

    def __init__(self, path: Path, threads: int) -> None:
        """`threads` of one product."""
        self._files = sorted(path.glob("*.safetensors"))
        self._checkpoint = Checkpoint(path)
        self._backend: Backend = make_backend("cpu", "auto", threads, self._checkpoint, 0)
        self._keys = [(n, e) for n in range(self._checkpoint.num_layers) for e in range(self._checkpoint.num_experts)]
        self.ways: dict[str, Callable[[], int]] = {
            "plain": self.read_files,
            "read and hashed": self.read_experts,
            "loaded": self.load_experts,
        }

    def read_files(self) -> int:
        """Read every shard from its begin to its end; returns the bytes."""
        return sum(map(read_file, self._files))

    def read_experts(self) -> int:
        """Read every expert and make its digest; returns the bytes."""
        before = self._checkpoint.bytes_read
        for key in self._keys:
            self._checkpoint.expert(*key)
        return self._checkpoint.bytes_read - before

    def load_experts(self) -> int:
        """All that an expert server does for an expert, keeping none; returns the bytes."""
        before = self._checkpoint.bytes_read
        for key in self._keys:
            self._backend.load(self._checkpoint.expert(*key))
        return self._checkpoint.bytes_read - before

    def drop_cache(self) -> None:
        """Ask the kernel to forget the files' pages; it keeps those that somebody has mapped or locked."""
        for path in self._files:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the checkpoint."""
        self._checkpoint.close()


def rates(path: Path, rounds: int, threads: int) -> list[dict[str, Any]]:
    """GB/s of each way, all ways once a round, so that a slow minute hits all; with a warm and a dropped cache."""
    loading = Loading(path, threads)
    try:
        loading.read_files()
        found: dict[tuple[str, str], list[float]] = {}
        for _ in range(rounds):
            for cache in ("warm", "dropped"):
                for name, way in loading.ways.items():
                    if cache == "dropped":
                        loading.drop_cache()
                    started_s = time.perf_counter()
                    nbytes = way()
                    found.setdefault((cache, name), []).append(nbytes / GB / (time.perf_counter() - started_s))
    finally:
        loading.close()
    return [
        {"cache": cache, "way": name, "gb_per_s": [round(v, 3) for v in values],
         "of_plain": round(median(values) / median(found[cache, "plain"]), 3)}
        for (cache, name), values in found.items()
    ]  # fmt: skip


def show_rates(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a table in markdown."""
    lines = ["| page cache | way | GB/s, median | least | most | of plain reads |", "|---" * 6 + "|"]
    for row in rows:
        values = row["gb_per_s"]
        lines.append(
            f"| {row['cache']} | {row['way']} | {median(values):.2f} | {min(values):.2f} | {max(values):.2f} | "
            f"{row['of_plain']:.0%} |"
        )
    return lines
