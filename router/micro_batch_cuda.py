"""The state of some rows between the layers of a forward pass on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from router.buffers_cuda import Step


@dataclass(eq=False)
class MicroBatch:
    """As `router.micro_batch.MicroBatch`: what the engine and the exchange touch lies in pinned host memory."""

    step: Step
    rows: int  # without padding
    expert_input: torch.Tensor  # float32 [n, hidden], host
    topk_ids: torch.Tensor  # int64 [n, k], host
    expert_output: torch.Tensor  # float32 [n, k, hidden], host
    layer: int = field(default=0)

    @property
    def topk_weights(self) -> torch.Tensor:
        """float32 [n, k], on the device: what the next segment combines the outputs with."""
        return self.step.topk_weights[: self.rows]

    def take_rows(self, whole: MicroBatch, rows: torch.Tensor) -> None:
        """Become these rows of `whole`, at the same point of the same layer."""
        self.layer = whole.layer
        on_device = rows.to(whole.step.residual.device)
        for name in ("residual", "topk_weights"):
            getattr(self.step, name)[: self.rows] = getattr(whole.step, name).index_select(0, on_device)
        for name in ("expert_input", "topk_ids", "expert_output"):
            getattr(self, name).copy_(getattr(whole, name).index_select(0, rows))
