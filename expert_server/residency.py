"""Which experts are in memory, shared by the compute thread (reads) and whoever loads (writes)."""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Any

import numpy as np

Key = tuple[int, int]
"""(layer, logical expert)."""


class Residency:
    """The loaded experts of one server. A lookup takes no lock: it is one dict access each."""

    def __init__(self) -> None:
        self._layers: defaultdict[int, dict[int, Any]] = defaultdict(dict)
        self._digests: dict[Key, bytes] = {}
        self._lock = threading.Lock()

    def find(self, layer: int, experts: list[int]) -> list[Any | None]:
        """The loaded experts of these; None for each that is not."""
        return list(map(self._layers[layer].get, experts))

    def keys(self) -> set[Key]:
        """What is loaded now."""
        with self._lock:
            return set(self._digests)

    def add(self, key: Key, expert: Any, digest: bytes) -> None:
        """Make a loaded expert available to the compute thread."""
        with self._lock:
            self._layers[key[0]][key[1]] = expert
            self._digests[key] = digest

    def drop(self, key: Key) -> None:
        """Forget an expert; a computation that has it already goes on with it."""
        with self._lock:
            del self._layers[key[0]][key[1]]
            del self._digests[key]

    def report(self) -> tuple[bytes, bytes]:
        """The content of a `Held` message: packed keys, sorted, and the 8-byte digest of each."""
        with self._lock:
            keys = sorted(self._digests)
            packed = np.array([layer << 16 | expert for layer, expert in keys], dtype="<u4").tobytes()
            return packed, b"".join(self._digests[key] for key in keys)
