"""The state of some rows between the layers of a forward pass on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from router.buffers_cuda import Step
from router.expert_rows_cuda import DeviceRows


@dataclass(eq=False)
class MicroBatch:
    """As `router.micro_batch.MicroBatch`: the experts' rows stay on the device, ids lie in pinned host memory."""

    step: Step
    rows: int  # without padding
    topk_ids: torch.Tensor  # int64 [n, k], host
    device_rows: DeviceRows
    layer: int = field(default=0)
    landed: bool = False  # the outputs of the last layer's experts are in the residual

    @property
    def topk_weights(self) -> torch.Tensor:
        """float32 [n, k], on the device: what the next segment combines the outputs with."""
        return self.step.topk_weights[: self.rows]

    def expert_rows(self) -> DeviceRows:
        """Inputs and outputs of the layer's experts."""
        return self.device_rows

    def take_rows(self, whole: MicroBatch, rows: torch.Tensor) -> None:
        """Become these rows of `whole`, at the same point of the same layer."""
        self.layer = whole.layer
        on_device = rows.to(whole.step.residual.device)
        for name in ("residual", "topk_weights", "inputs"):
            getattr(self.step, name)[: self.rows] = getattr(whole.step, name).index_select(0, on_device)
        self.step.buffers.host_inputs[: self.rows] = whole.step.buffers.host_inputs.index_select(0, rows)
        self.topk_ids.copy_(whole.topk_ids.index_select(0, rows))
        top_k = self.topk_ids.shape[1]
        slots = rows.unsqueeze(1) * top_k + torch.arange(top_k)
        self.device_rows.take(whole.device_rows, slots.flatten().numpy())
