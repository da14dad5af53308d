"""Experts on a GPU: all of a server's experts in one tensor, one copy in each direction per grouped call.

The places of rows and the tile list travel to the GPU as one piece of pinned memory, together with float32 rows, which
are rounded on the way; bf16 ones go straight from where they lie to the GPU, and their results straight back. All
memory is allotted at the start, and every kernel compiled, so that computing can neither stall nor run out of memory.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from expert_server.host_replicas_cuda import PinnedReplicas
from expert_server.slots_cuda import CudaExpert, Slots
from kernels import pinning
from kernels.tensors import rows_tensor
from kernels.triton_expert_ffn import GroupedExperts, numerics_fingerprint
from kernels.triton_grouping import TILE_FIELDS, Grouping, list_tiles
from kernels.triton_tiling import choose_tiling
from moering.checkpoint import ExpertWeights
from moering.errors import ConfigError
from moering.expert_frames import ITEM_BYTES
from moering.protocol import MAX_FRAME_BYTES
from moering.shared_rows import Pin
from moering.transport import SPIN_S

logger = logging.getLogger(__name__)

CALL_PAIRS = 1024
"""Pairs of one kernel call; more are computed piece by piece, with the same bits."""
MEMORY_SHARE = 0.8
"""Of the free GPU memory, for experts, where no capacity is given."""
_ALIGN = 64  # integers


class CudaBackend:
    """See `expert_server.backend.Backend`. Weights, rows and results are bf16, in float32 frames as well."""

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        capacity: int = 0,
        threads: int = 1,
        host_replicas: int = 0,
        device: str = "cuda",
    ) -> None:
        """`capacity`: experts; 0: what fits into `MEMORY_SHARE` of the memory that is free now.

        `threads`: of copies on the host.  `host_replicas`: further experts that pinned memory has room for.
        """
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda: PyTorch finds no GPU")
        self._device, self._hidden = torch.device(device), hidden
        self.pin: Pin | None = pinning.pin if self._device.type == "cuda" else None
        if capacity == 0:
            free, _ = torch.cuda.mem_get_info()
            capacity = max(1, int(free * MEMORY_SHARE) // (6 * hidden * intermediate))
        self._workspace = _Workspace(hidden, intermediate, self._device)
        self._slots = Slots(hidden, intermediate, capacity, self._device)
        self.host_replicas = PinnedReplicas(self._slots, host_replicas)
        self._kernels = GroupedExperts(self._slots.w13, self._slots.w2)
        self.fingerprint = numerics_fingerprint(self._device)
        self._warm_up(hidden)
        logger.info("room for %d experts on %s", self._slots.capacity, self._device)

    @property
    def capacity(self) -> int:
        """Slots."""
        return self._slots.capacity

    @property
    def dtype(self) -> str:
        """Of weights, rows and results."""
        return "bfloat16"

    @property
    def max_tensor_bytes(self) -> int:
        """One kernel call's, as far as a frame holds it: every message costs, a call of many pairs not much more."""
        return min(CALL_PAIRS * ITEM_BYTES[self.dtype] * self._hidden, MAX_FRAME_BYTES)

    @property
    def slot_bytes(self) -> int:
        """Whole messages: a frame of so many megabytes takes milliseconds through a socket."""
        return self.max_tensor_bytes

    @property
    def spin_s(self) -> float:
        """See `moering.transport.SPIN_S`."""
        return SPIN_S if self._device.type == "cuda" else 0.0

    def load(self, weights: ExpertWeights) -> CudaExpert:
        """One expert, as bf16, in a slot; the caller's thread waits for the copy, computations do not."""
        return self._slots.load(weights)

    def compute(
        self,
        hidden: np.ndarray,
        rows: np.ndarray | None,
        counts: list[int],
        experts: Sequence[CudaExpert],
        out: np.ndarray,
    ) -> None:
        """See `expert_server.backend.Backend`."""
        rows = np.arange(len(hidden)) if rows is None else rows
        slots = np.array([expert.slot for expert in experts], np.int32)
        if len(rows) <= CALL_PAIRS:
            self._compute(hidden, rows, np.array(counts), slots, out)
            return
        ids = np.repeat(np.arange(len(counts)), counts)
        for start in range(0, len(rows), CALL_PAIRS):
            piece = slice(start, start + CALL_PAIRS)
            used, local_rows = np.unique(rows[piece], return_inverse=True)
            which, local_counts = np.unique(ids[piece], return_counts=True)
            self._compute(hidden[used], local_rows, local_counts, slots[which], out[piece])

    def _compute(
        self, hidden: np.ndarray, rows: np.ndarray, counts: np.ndarray, slots: np.ndarray, out: np.ndarray
    ) -> None:
        pairs = len(rows)
        tiling = replace(choose_tiling(pairs, len(counts)), pdl=False)
        tiles = list_tiles(counts, slots, tiling.block_m)
        workspace = self._workspace
        x, grouping = workspace.send(hidden, rows, tiles, tiling.block_m)
        activations, results = workspace.activations[:pairs], workspace.results[:pairs]
        self._kernels.gate_up(x, grouping, activations, tiling)
        self._kernels.down(activations, grouping, results, tiling)
        workspace.receive(pairs, out)

    def _warm_up(self, hidden: int) -> None:
        """Compile what any number of pairs may need: one call for each tiling."""
        seen = set()
        for pairs in range(1, CALL_PAIRS + 1):
            for experts in (1, min(pairs, self.capacity)):
                tiling = choose_tiling(pairs, experts)
                if tiling not in seen:
                    seen.add(tiling)
                    counts = np.full(experts, pairs // experts)
                    counts[0] += pairs % experts
                    x, out = np.zeros((1, hidden), np.int16), np.empty((pairs, hidden), np.int16)
                    self._compute(x, np.zeros(pairs, np.int64), counts, np.arange(experts, dtype=np.int32), out)


class _Workspace:
    """Pinned and device memory of one call: integers and rows on the way in, results on the way out."""

    def __init__(self, hidden: int, intermediate: int, device: torch.device) -> None:
        self._cuda, self._hidden = device.type == "cuda", hidden
        # one of num_tiles; order, rows: [pairs]; at most as many tiles as pairs
        self._order_at, self._rows_at = _ALIGN, _ALIGN + CALL_PAIRS
        self._tiles_at = _ALIGN + 2 * CALL_PAIRS
        self._max_ints = self._tiles_at + TILE_FIELDS.value * CALL_PAIRS
        size = self._max_ints + CALL_PAIRS * hidden // 2
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=self._cuda)
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        self._ints = self._host.numpy()
        self._ints[self._order_at : self._order_at + CALL_PAIRS] = np.arange(CALL_PAIRS)
        self.activations = torch.zeros(CALL_PAIRS, intermediate, dtype=torch.bfloat16, device=device)
        self.results = torch.zeros(CALL_PAIRS, hidden, dtype=torch.bfloat16, device=device)
        self._host_results = torch.zeros(CALL_PAIRS, hidden, dtype=torch.bfloat16, pin_memory=self._cuda)

    def send(
        self, hidden: np.ndarray, rows: np.ndarray, tiles: np.ndarray, block_m: int
    ) -> tuple[torch.Tensor, Grouping]:
        """Start the copy of everything the kernels read. Pairs are in the order of their experts already."""
        pairs, count = len(rows), len(hidden)
        self._ints[0] = len(tiles)
        self._ints[self._rows_at : self._rows_at + pairs] = rows
        tiles_end = self._tiles_at + tiles.size
        self._ints[self._tiles_at : tiles_end] = tiles.reshape(-1)
        x_at = tiles_end + -tiles_end % _ALIGN
        x_end = x_at + count * self._hidden // 2
        x = self._device[x_at:x_end].view(torch.bfloat16).view(count, -1)
        wide = hidden.dtype == np.float32
        if wide:
            self._host[x_at:x_end].view(torch.bfloat16).view(count, -1).copy_(torch.from_numpy(hidden))
        else:
            x.copy_(rows_tensor(hidden), non_blocking=True)
        end = x_end if wide else tiles_end
        self._device[:end].copy_(self._host[:end], non_blocking=True)
        order, row_ids = (self._device[at : at + pairs] for at in (self._order_at, self._rows_at))
        on_device = self._device[self._tiles_at : tiles_end].view(-1, TILE_FIELDS.value)
        return x, Grouping(order, row_ids, on_device, self._device[:1], block_m)

    def receive(self, pairs: int, out: np.ndarray) -> None:
        """Wait for the results, and until nothing reads what `send` was given; float32 ones are widened into `out`."""
        wide = out.dtype == np.float32
        target = self._host_results[:pairs] if wide else rows_tensor(out)
        target.copy_(self.results[:pairs], non_blocking=True)
        if self._cuda:
            torch.cuda.current_stream().synchronize()
        if wide:
            torch.from_numpy(out).copy_(target)
