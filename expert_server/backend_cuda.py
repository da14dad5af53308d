"""Experts on a GPU: all of a server's experts in a few tensors, one copy of rows and one launch per grouped call.

bf16 rows are copied from where they lie to the GPU, and the kernel writes its results where they are wanted; float32
ones are rounded on the way. The copy of the lists, the tiles made of them (not of few pairs) and the kernels that
compute are one CUDA graph for each shape: launching them one by one from Python takes longer than a decode step's rows
take the GPU. All memory is allotted at the start, and every kernel compiled, so that computing can neither stall nor
run out of memory.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from triton import next_power_of_2

from expert_server.formats_cuda import Format, nbytes
from expert_server.host_replicas_cuda import PinnedReplicas
from expert_server.slots_cuda import CudaExpert, Slots
from kernels import pinning
from kernels.graphs import Graphs
from kernels.tensors import rows_tensor
from kernels.triton_grouping import TILE_FIELDS, Grouping, list_sorted
from kernels.triton_small_tiles import SmallTiling
from kernels.triton_tiling import FFNTiling
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
    """See `expert_server.backend.Backend`. Rows and results are bf16, in float32 frames as well."""

    def __init__(
        self,
        weight_format: Format,
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
        hidden, intermediate = weight_format.hidden, weight_format.intermediate
        self._device, self._hidden = torch.device(device), hidden
        self.pin: Pin | None = pinning.pin if self._device.type == "cuda" else None
        if capacity == 0:
            free, _ = torch.cuda.mem_get_info()
            capacity = max(1, int(free * MEMORY_SHARE) // nbytes(weight_format.parts))
        self._workspace = _Workspace(hidden, intermediate, self._device)
        self._slots = Slots(weight_format, capacity, self._device)
        self.host_replicas = PinnedReplicas(self._slots, host_replicas)
        self._kernels = weight_format.kernels(self._slots.parts)
        self._graphs = Graphs(self._device)
        self.fingerprint = weight_format.fingerprint(self._device)
        self._warm_up(hidden)
        size = self._slots.expert_bytes
        logger.info("room for %d experts of %d bytes on %s", self._slots.capacity, size, self._device)

    @property
    def capacity(self) -> int:
        """Slots."""
        return self._slots.capacity

    @property
    def row_multiple(self) -> int:
        """None is filled up."""
        return 1

    @property
    def dtype(self) -> str:
        """Of rows and results."""
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
        """One expert in a slot; the caller's thread waits for the copy, computations do not."""
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
        slots = [expert.slot for expert in experts]
        if len(rows) <= CALL_PAIRS:
            self._compute(hidden, rows, counts, slots, out)
            return
        ids = np.repeat(np.arange(len(counts)), counts)
        for start in range(0, len(rows), CALL_PAIRS):
            piece = slice(start, start + CALL_PAIRS)
            used, local_rows = np.unique(rows[piece], return_inverse=True)
            which, local_counts = np.unique(ids[piece], return_counts=True)
            self._compute(hidden[used], local_rows, local_counts.tolist(), [slots[i] for i in which], out[piece])

    def _compute(
        self, hidden: np.ndarray, rows: np.ndarray, counts: list[int], slots: list[int], out: np.ndarray
    ) -> None:
        pairs, experts = len(rows), len(counts)
        if pairs <= self._kernels.most_few_pairs:
            with self._workspace.call(hidden, rows, counts, np.repeat(slots, counts).tolist(), out):
                self._graphs.run((pairs,), lambda: self._launch_few(pairs))
            return
        tiling = self._kernels.choose_tiling(pairs, experts)
        block_m = tiling.block_m
        most_tiles = experts if max(counts) <= block_m else experts + (pairs - experts) // block_m
        room = next_power_of_2(most_tiles)  # few shapes, so few graphs; programs that find no tile end at once
        with self._workspace.call(hidden, rows, counts, slots, out):
            self._graphs.run((tiling, room), lambda: self._launch(tiling, room))

    def _launch(self, tiling: FFNTiling | SmallTiling, max_tiles: int) -> None:
        """From the lists in pinned memory to the results."""
        workspace = self._workspace
        grouping = workspace.fetch_grouping(max_tiles, tiling.block_m)
        self._kernels.ffn(workspace.x, grouping, workspace.activations, workspace.results_at, tiling)

    def _launch_few(self, pairs: int) -> None:
        """Likewise; the workspace has the slot of each pair."""
        workspace = self._workspace
        rows, _, slots = (numbers[:pairs] for numbers in workspace.fetch_lists())
        self._kernels.few_pairs(workspace.x, slots, rows, 1, workspace.activations, workspace.results_at)

    def _warm_up(self, hidden: int) -> None:
        """Compile what any number of pairs may need: one call of few pairs, and one for each tiling."""
        few, seen = self._kernels.most_few_pairs, set()
        for pairs, experts in warm_up_calls(self.capacity):
            tiling = None if pairs <= few else self._kernels.choose_tiling(pairs, experts)
            if tiling not in seen:
                seen.add(tiling)
                counts = [pairs // experts] * experts
                counts[0] += pairs % experts
                x, out = np.zeros((1, hidden), np.int16), np.empty((pairs, hidden), np.int16)
                self._compute(x, np.zeros(pairs, np.int64), counts, list(range(experts)), out)


def warm_up_calls(capacity: int) -> Iterator[tuple[int, int]]:
    """(pairs, experts that they are for) that meet every tiling."""
    for pairs in range(1, CALL_PAIRS + 1):
        for rows in (1, 4, 16, pairs):  # of each expert
            yield pairs, min(-(-pairs // rows), capacity)


class _Workspace:
    """Pinned and device memory of one call: lists, and rows that cannot be used where they are.

    Every address is fixed, for the graphs. Pairs are in the order of their experts already.
    """

    def __init__(self, hidden: int, intermediate: int, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        rows = (CALL_PAIRS, hidden)
        self.x = torch.zeros(rows, dtype=torch.bfloat16, device=device)
        self.activations = torch.zeros(CALL_PAIRS, intermediate, dtype=torch.bfloat16, device=device)
        self._host_x, self._host_results = (
            torch.zeros(rows, dtype=torch.bfloat16, pin_memory=self._cuda) for _ in range(2)
        )
        # the number of experts, the results' address; then the row of each pair, the pairs and the slot of each expert
        self._rows_at, self._counts_at, self._slots_at = (_ALIGN + n * CALL_PAIRS for n in range(3))
        size = _ALIGN + 3 * CALL_PAIRS
        self._host_lists = torch.zeros(size, dtype=torch.int32, pin_memory=self._cuda)
        self._lists = torch.zeros(size, dtype=torch.int32, device=device)
        self._array = self._host_lists.numpy()
        self._address = self._array[2:4].view(np.int64)
        self.results_at = self._lists[2:4].view(torch.int64)
        self._order = torch.arange(CALL_PAIRS, dtype=torch.int32, device=device)
        self._tiles = torch.zeros(CALL_PAIRS, TILE_FIELDS.value, dtype=torch.int32, device=device)
        self._num_tiles = torch.zeros(1, dtype=torch.int32, device=device)

    @contextlib.contextmanager
    def call(
        self, hidden: np.ndarray, rows: np.ndarray, counts: list[int], slots: list[int], out: np.ndarray
    ) -> Iterator[None]:
        """The block computes `out`; nothing reads or writes any of these any more after it."""
        self._array[0] = len(counts)
        for at, numbers in ((self._rows_at, rows), (self._counts_at, counts), (self._slots_at, slots)):
            self._array[at : at + len(numbers)] = numbers
        source, results = rows_tensor(hidden), rows_tensor(out)
        if source.dtype == torch.float32:
            source = self._host_x[: len(hidden)].copy_(source)
        self.x[: len(hidden)].copy_(source, non_blocking=True)
        in_place = results.dtype == torch.bfloat16 and (results.is_pinned() or not self._cuda)
        self._address[0] = (results if in_place else self._host_results).data_ptr()
        yield
        if self._cuda:
            torch.cuda.current_stream().synchronize()
        if not in_place:
            results.copy_(self._host_results[: len(rows)])

    def fetch_lists(self) -> tuple[torch.Tensor, ...]:
        """Start the copy of the lists to the device: rows, counts and slots, as `call` got them."""
        self._lists.copy_(self._host_lists, non_blocking=True)
        return tuple(self._lists[at : at + CALL_PAIRS] for at in (self._rows_at, self._counts_at, self._slots_at))

    def fetch_grouping(self, max_tiles: int, block_m: int) -> Grouping:
        """Start the copy of the lists to the device, and what makes tiles of them."""
        rows, counts, slots = self.fetch_lists()
        list_sorted(self._lists[:1], counts, slots, self._tiles, self._num_tiles, block_m)
        return Grouping(self._order, rows, self._tiles[:max_tiles], self._num_tiles, block_m)
