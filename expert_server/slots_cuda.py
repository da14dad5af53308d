"""Room for experts in GPU memory, allotted once: slots of one tensor, filled on a stream of their own.

Loading so never allocates, never waits for a computation, and no computation waits for it. A slot is free again when
the last reference to its expert is gone; whoever computes with it holds one until the result is there.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Sequence

import torch

from expert_server.backend import NoRoom
from kernels.tensors import as_tensor
from moering.checkpoint import ExpertWeights
from moering.errors import ConfigError

logger = logging.getLogger(__name__)

COPY_BYTES = 1 << 20
"""A copy to the GPU in flight holds up the copy of rows behind it by so much at most (40 µs at 25 GB/s)."""
WAIT_S = 1.0  # for a computation that still uses an expert that was dropped
SHRINK = 0.8


class CudaExpert:
    """One expert in GPU memory."""

    __slots__ = ("__weakref__", "slot")

    def __init__(self, slot: int) -> None:
        self.slot = slot


class Slots:
    """`w13` [capacity, 2 * intermediate, hidden] and `w2` [capacity, hidden, intermediate], bf16."""

    def __init__(self, hidden: int, intermediate: int, capacity: int, device: torch.device) -> None:
        """Room for `capacity` experts, or for fewer where memory does not suffice.

        Raises `ConfigError` when there is no room for one.
        """
        self.w13, self.w2 = _allot(hidden, intermediate, capacity, device)
        self.capacity = self.w13.shape[0]
        self._free = list(range(self.capacity - 1, -1, -1))
        self._released = threading.Condition(threading.RLock())  # a finalizer may run within any allocation here
        self.on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self.on_gpu else None
        self.expert_size = 3 * intermediate * hidden
        self._staging = torch.empty(self.expert_size, dtype=torch.bfloat16, pin_memory=self.on_gpu)

    def load(self, weights: ExpertWeights) -> CudaExpert:
        """Copy an expert's weights to a free slot and wait until they are there; one thread at a time.

        Raises `NoRoom` when no slot gets free.
        """
        flatten(weights, self._staging)
        return self.fill(self._staging)

    def fill(self, source: torch.Tensor) -> CudaExpert:
        """The same for weights that `flatten` has put into pinned memory."""
        expert = self._take()
        w13, w2 = self.w13[expert.slot].view(-1), self.w2[expert.slot].view(-1)
        self._copy(((w13, source[: w13.numel()]), (w2, source[w13.numel() :])))
        return expert

    def _copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        with torch.cuda.stream(self._stream):  # None: a no-op
            for target, source in pairs:
                step = COPY_BYTES // source.element_size()
                for piece, chunk in zip(target.split(step), source.split(step), strict=True):
                    piece.copy_(chunk, non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()

    def _take(self) -> CudaExpert:
        with self._released:
            if not self._released.wait_for(lambda: bool(self._free), WAIT_S):
                raise NoRoom(f"all {self.capacity} slots for experts are in use")
            expert = CudaExpert(self._free.pop())
        weakref.finalize(expert, self._give_back, expert.slot)
        return expert

    def _give_back(self, slot: int) -> None:
        with self._released:
            self._free.append(slot)
            self._released.notify_all()


def flatten(weights: ExpertWeights, out: torch.Tensor) -> None:
    """An expert's three projections, one after another, as bf16: gate and up, then down."""
    start = 0
    for part in map(as_tensor, weights.parts):
        out[start : start + part.numel()].copy_(part.reshape(-1))
        start += part.numel()


def _allot(hidden: int, intermediate: int, capacity: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    wanted = capacity
    while capacity >= 1:
        try:
            w13 = torch.zeros(capacity, 2 * intermediate, hidden, dtype=torch.bfloat16, device=device)
            w2 = torch.zeros(capacity, hidden, intermediate, dtype=torch.bfloat16, device=device)
        except torch.OutOfMemoryError:
            w13 = w2 = torch.empty(0)  # gives back the one that succeeded
            torch.cuda.empty_cache()
            capacity = int(capacity * SHRINK)
            logger.warning("out of GPU memory; trying again with room for %d experts instead of %d", capacity, wanted)
        else:
            return w13, w2
    raise ConfigError(f"no room in GPU memory for an expert of {6 * hidden * intermediate} bytes")
