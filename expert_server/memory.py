"""What fits in memory, and giving memory back."""

from __future__ import annotations

import contextlib
import ctypes
import os


def default_capacity(expert_bytes: int) -> int:
    """Experts that fit in 80 % of the memory that is available now; without /proc, of half of all there is."""
    try:
        with open("/proc/meminfo", encoding="ascii") as f:
            free = next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except OSError:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return max(1, int(free * 0.8) // expert_bytes)


def release_free_memory() -> None:
    """Return what malloc keeps for later to the system: loading needs much more than serving. glibc only."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
