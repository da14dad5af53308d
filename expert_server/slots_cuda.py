"""Room for experts in GPU memory, allotted once: slots of a few tensors, filled on a stream of their own.

Loading so never allocates, never waits for a computation, and no computation waits for it. What is not copied to a slot
as it is lands beside the slots, in room for one expert, and is arranged from there on the same stream. A slot is free
again when the last reference to its expert is gone; whoever computes with it holds one until the result is there.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Sequence

import torch

from expert_server.backend import NoRoom
from expert_server.formats_cuda import Format, nbytes, split
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
    """`parts`: the tensors of the format, each [capacity, …]."""

    def __init__(self, weight_format: Format, capacity: int, device: torch.device) -> None:
        """Room for `capacity` experts, or for fewer where memory does not suffice.

        Raises `ConfigError` when there is no room for one.
        """
        self.format = weight_format
        self.expert_bytes = nbytes(weight_format.parts)
        self._landing: Sequence[torch.Tensor] = ()  # nowhere but in the slot itself
        if weight_format.host_parts != weight_format.parts:
            landing = torch.empty(self.expert_bytes, dtype=torch.uint8, device=device)
            self._landing = split(landing, weight_format.host_parts)
        self.parts = _allot(weight_format, capacity, device)
        self.capacity = self.parts[0].shape[0]
        self._free = list(range(self.capacity - 1, -1, -1))
        self._released = threading.Condition(threading.RLock())  # a finalizer may run within any allocation here
        self.on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self.on_gpu else None
        self._staging = torch.zeros(self.expert_bytes, dtype=torch.uint8, pin_memory=self.on_gpu)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # the zeros that come before all experts
        self.fill(self._staging)  # compiles the kernel that arranges; the slot is free again at once

    def load(self, weights: ExpertWeights) -> CudaExpert:
        """Copy an expert's weights to a free slot and wait until they are there; one thread at a time.

        Raises `NoRoom` when no slot gets free.
        """
        self.prepare(weights, self._staging)
        return self.fill(self._staging)

    def prepare(self, weights: ExpertWeights, memory: torch.Tensor) -> None:
        """Put an expert into `expert_bytes` of host memory, for `fill`."""
        self.format.fill(split(memory, self.format.host_parts), weights)

    def fill(self, memory: torch.Tensor) -> CudaExpert:
        """`load` of an expert that `prepare` has put into pinned memory; raises the same."""
        expert = self._take()
        slot = [part[expert.slot] for part in self.parts]
        landed = self._landing or slot
        with torch.cuda.stream(self._stream):  # None: a no-op
            _copy(landed, split(memory, self.format.host_parts))
            self.format.arrange(landed, slot)
        if self._stream is not None:
            self._stream.synchronize()
        return expert

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


def _copy(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        step = COPY_BYTES // source.element_size()
        for piece, chunk in zip(target.view(-1).split(step), source.view(-1).split(step), strict=True):
            piece.copy_(chunk, non_blocking=True)


def _allot(weight_format: Format, capacity: int, device: torch.device) -> list[torch.Tensor]:
    wanted = capacity
    while capacity >= 1:
        parts: list[torch.Tensor] = []
        try:
            for shape, dtype in weight_format.parts:
                parts.append(torch.zeros(capacity, *shape, dtype=dtype, device=device))
        except torch.OutOfMemoryError:
            parts.clear()  # gives back those that succeeded
            torch.cuda.empty_cache()
            capacity = int(capacity * SHRINK)
            logger.warning("out of GPU memory; trying again with room for %d experts instead of %d", capacity, wanted)
        else:
            return parts
    raise ConfigError(f"no room in GPU memory for an expert of {nbytes(weight_format.parts)} bytes")
