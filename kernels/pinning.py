"""Host memory that a GPU reads and writes by itself, at its address, without the driver's own buffers in between."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable

import numpy as np
import torch

logger = logging.getLogger(__name__)


def pin(memory: np.ndarray) -> Callable[[], None] | None:
    """Pin `memory`, contiguous, until what is returned is called, which keeps it until then: of memory that was given
    back pinned the GPU would go on to use the old pages, whatever is mapped there by then.

    None where pinning fails: copies are as right as before, and slower. Said once.
    """
    if not register(memory.ctypes.data, memory.nbytes):
        _say_that_it_failed()
        return None
    return functools.partial(_unpin, memory)


def register(address: int, size: int) -> bool:
    """Pin so many bytes from `address` on; whether that was possible."""
    if int(torch.cuda.cudart().cudaHostRegister(address, size, 0)) == 0:
        return True
    if torch.cuda.is_available():
        # The error stays with this thread until the next launch, which would be taken to have failed.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device="cuda").add_(1)
    return False


def unregister(address: int) -> None:
    """Undo `register`, before the memory is given back."""
    torch.cuda.cudart().cudaHostUnregister(address)


def _unpin(memory: np.ndarray) -> None:
    unregister(memory.ctypes.data)


@functools.cache
def _say_that_it_failed() -> None:
    logger.warning("shared memory cannot be pinned: rows go by way of the driver's buffers, which is slower")
