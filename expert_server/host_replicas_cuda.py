"""Experts in pinned host memory, from where a copy to the GPU takes less than a millisecond."""

from __future__ import annotations

import logging
import weakref

import torch

from expert_server.memory import default_capacity
from expert_server.residency import Key
from expert_server.slots_cuda import SHRINK, CudaExpert, Slots
from kernels import pinning
from moering.checkpoint import ExpertWeights

logger = logging.getLogger(__name__)


class PinnedReplicas:
    """See `expert_server.standby.HostReplicas`. All memory is allotted and pinned at once, before serving begins:
    pinning takes locks of the driver that computations need. One thread at a time."""

    def __init__(self, slots: Slots, capacity: int) -> None:
        """Room for `capacity` experts, or for fewer where memory does not suffice."""
        self._slots = slots
        self._memory = _pinned(slots.expert_bytes, capacity, slots.on_gpu)
        self.capacity = len(self._memory)
        if self.capacity and slots.on_gpu:
            weakref.finalize(self, pinning.unregister, self._memory.data_ptr()).atexit = False
        self._free = list(range(self.capacity))
        self._held: dict[Key, tuple[int, bytes]] = {}

    def keys(self) -> set[Key]:
        """What is there."""
        return set(self._held)

    def keep(self, keys: set[Key]) -> None:
        """Forget all others."""
        for key in self._held.keys() - keys:
            self._free.append(self._held.pop(key)[0])

    def put(self, key: Key, weights: ExpertWeights) -> None:
        """Take a copy; there must be room."""
        row = self._free.pop()
        self._slots.prepare(weights, self._memory[row])
        self._held[key] = row, weights.digest

    def promote(self, key: Key) -> tuple[CudaExpert, bytes] | None:
        """Copied to the GPU on the loading stream, and there on return; the copy here stays."""
        if key not in self._held:
            return None
        row, digest = self._held[key]
        return self._slots.fill(self._memory[row]), digest


def _pinned(size: int, capacity: int, pin: bool) -> torch.Tensor:
    """[capacity or fewer, size] bytes, which is not rounded up to a power of two, as PyTorch's own pinning does."""
    wanted, capacity = capacity, min(capacity, default_capacity(size))
    while capacity > 0:
        memory = torch.empty(capacity, size, dtype=torch.uint8)
        if not pin or pinning.register(memory.data_ptr(), memory.nbytes):
            break
        capacity = int(capacity * SHRINK)
    else:
        memory = torch.empty(0, size, dtype=torch.uint8)
    if capacity < wanted:
        logger.warning("pinned host memory has room for %d experts instead of %d", capacity, wanted)
    return memory
