"""The rows of one layer's experts on a GPU, bf16: they go from there to where connections want them, and back."""

from __future__ import annotations

import weakref

import numpy as np
import torch

from kernels.tensors import rows_tensor
from router.instructions import Dispatch


class DeviceRows:
    """See `router.expert_rows.ExpertRows`. `addresses` tells where each output is.

    The next segment reads outputs where they came, in memory that servers share; those that come otherwise are copied
    to the device, on the current stream, before that segment.
    """

    def __init__(self, inputs: torch.Tensor, outputs: torch.Tensor, addresses: torch.Tensor) -> None:
        """`inputs` bf16 [n, hidden] on the host; `outputs` bf16 [n × k, hidden] on the device, for those that are
        copied; `addresses` int64 [n × k or more] on the host: where the row of each slot is, 0 while it has none."""
        self._inputs = inputs.view(torch.int16).numpy()
        self._outputs, self._addresses = outputs, addresses.numpy()
        self._row_bytes = outputs.stride(0) * outputs.element_size()
        self.begin_layer()

    def begin_layer(self) -> None:
        """See `ExpertRows`; nothing may read `addresses` any more either."""
        self._addresses.fill(0)
        self._filled = 0  # rows of `outputs`
        self._there = _There()

    def pack(self, d: Dispatch, out: np.ndarray) -> tuple[int, bytes]:
        """Each row once: all of the micro-batch's as they lie, unless that is more than there are pairs."""
        every = len(self._inputs) <= len(d.experts)
        rows, local = (self._inputs, d.pair_rows.astype("<u2")) if every else (self._inputs[d.rows], d.local_rows())
        if out.dtype == np.int16:
            out[: len(rows)] = rows
        else:
            rows_tensor(out[: len(rows)]).copy_(rows_tensor(rows))
        return len(rows), local.tobytes() + d.experts.astype(np.uint16).tobytes()

    def frame(self, d: Dispatch, dtype: str) -> np.ndarray:
        """See `ExpertRows`."""
        rows = self._inputs[d.rows]
        return rows if dtype == "bfloat16" else rows_tensor(rows).float().numpy()

    def put(self, slots: np.ndarray, rows: np.ndarray, memory: object | None = None) -> weakref.ref[_There] | None:
        """See `ExpertRows`; float32 rows are rounded to bf16."""
        if memory is None or rows.dtype != np.int16:
            self._copy(slots, rows)
            return None
        self._addresses[slots] = np.arange(len(slots)) * self._row_bytes + rows.ctypes.data
        self._there.append((slots, rows, memory))
        return weakref.ref(self._there)

    def keep(self) -> None:
        """See `ExpertRows`."""
        for slots, rows, _ in self._there:
            self._copy(slots, rows)
        if self._outputs.is_cuda:
            torch.cuda.current_stream().synchronize()
        self._there = _There()

    def clear(self, slots: np.ndarray) -> None:
        """See `ExpertRows`."""
        self._addresses[slots] = 0

    def take(self, whole: DeviceRows, slots: np.ndarray) -> None:
        """Have the outputs that `whole` has for these slots (int64), in their order."""
        whole.keep()
        at = whole._addresses[slots]
        there = np.flatnonzero(at)
        self.begin_layer()
        chosen = (at[there] - whole._outputs.data_ptr()) // self._row_bytes
        self._outputs[: len(there)] = whole._outputs.index_select(0, torch.from_numpy(chosen).to(self._outputs.device))
        self._point_at_outputs(there)

    def _copy(self, slots: np.ndarray, rows: np.ndarray) -> None:
        source = rows_tensor(rows if rows.flags.writeable else rows.copy())
        self._outputs[self._filled : self._filled + len(slots)].copy_(source)
        self._point_at_outputs(slots)

    def _point_at_outputs(self, slots: np.ndarray) -> None:
        """These slots have the next rows of `outputs`."""
        first, self._filled = self._filled, self._filled + len(slots)
        self._addresses[slots] = np.arange(first, self._filled) * self._row_bytes + self._outputs.data_ptr()


class _There(list[tuple[np.ndarray, np.ndarray, object]]):
    """Slots, their rows where they came, and what keeps them there. It lives until those have been read."""
