"""One thread for the ops whose bits depend on how threads split the work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PARALLEL_ELEMENTS = 32768
"""PyTorch computes smaller elementwise ops on one thread anyway."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the body's ops on the calling thread alone (costs under 1 µs)."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
