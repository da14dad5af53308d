"""The rows of one layer's experts on a GPU, bf16: they go from there to where connections want them, and back."""

from __future__ import annotations

import numpy as np
import torch

from kernels.tensors import rows_tensor
from router.instructions import Dispatch

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class DeviceRows:
    """See `router.expert_rows.ExpertRows`. Outputs lie in the order of their arrival; `index` tells where each is.

    All copies run on the current stream, before the next segment, which reads what they bring.
    """

    at_once = False

    def __init__(self, inputs: torch.Tensor, outputs: torch.Tensor, index: np.ndarray) -> None:
        """`inputs` bf16 [n, hidden] and `outputs` bf16 [n × k, hidden] on the device; `index` int32 [n × k or more] in
        pinned memory: the row of `outputs` that each slot has, -1 while it has none."""
        self._inputs, self._outputs, self._index = inputs, outputs, index
        self._filled = 0  # rows of `outputs`

    def begin_layer(self) -> None:
        """Forget the outputs of the layer before; nothing may read `index` any more."""
        self._index.fill(-1)
        self._filled = 0

    def pack(self, d: Dispatch, out: np.ndarray) -> tuple[int, bytes]:
        """Each row once: all of the micro-batch's as they lie, unless that is more than there are pairs."""
        every = len(self._inputs) <= len(d.experts)
        rows, local = (self._inputs, d.pair_rows.astype("<u2")) if every else (self._chosen(d), d.local_rows())
        copy_rows(rows_tensor(out[: len(rows)]), rows)
        return len(rows), local.tobytes() + d.experts.astype(np.uint16).tobytes()

    def settle(self) -> None:
        """Wait for the stream."""
        if self._inputs.is_cuda:
            torch.cuda.current_stream().synchronize()

    def frame(self, d: Dispatch, dtype: str) -> np.ndarray:
        """By way of ordinary memory."""
        rows = self._chosen(d).to("cpu", _DTYPES[dtype])
        return (rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows).numpy()

    def put(self, slots: np.ndarray, rows: np.ndarray) -> torch.cuda.Event | None:
        """Start the copy, which the event ends; float32 rows are rounded to bf16."""
        start, self._filled = self._filled, self._filled + len(slots)
        copy_rows(self._outputs[start : self._filled], rows_tensor(rows if rows.flags.writeable else rows.copy()))
        self._index[slots] = np.arange(start, self._filled)
        if not self._outputs.is_cuda:
            return None
        copied = torch.cuda.Event()
        copied.record()
        return copied

    def clear(self, slots: np.ndarray) -> None:
        """See `ExpertRows`."""
        self._index[slots] = -1

    def take(self, whole: DeviceRows, slots: np.ndarray) -> None:
        """Have the outputs that `whole` has for these slots (int64), in their order."""
        at = whole._index[slots]
        there = np.flatnonzero(at >= 0)
        self.begin_layer()
        self._filled = len(there)
        chosen = torch.from_numpy(at[there]).to(self._outputs.device)
        self._outputs[: self._filled] = whole._outputs.index_select(0, chosen)
        self._index[there] = np.arange(self._filled)

    def _chosen(self, d: Dispatch) -> torch.Tensor:
        return self._inputs.index_select(0, torch.from_numpy(d.rows).to(self._inputs.device))


def copy_rows(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy between host and device; unwaited, unless the type changes on the way."""
    target.copy_(source, non_blocking=target.dtype == source.dtype)
