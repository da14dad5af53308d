"""The state of some rows between the layers of a forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from router.attention_plan import SequenceChunk
from router.expert_rows import HostRows


@dataclass(eq=False, kw_only=True)
class MicroBatch:
    """Rows of several sequences on their way through the layers, n rows in the order of `chunks`.

    `until_experts` of a layer fills expert_input, topk_ids and topk_weights. The engine fills expert_output: slot
    [row, j] is the unweighted output of expert topk_ids[row, j] for expert_input[row]. `after_experts` sums them up.
    """

    token_ids: torch.Tensor  # int64 [n]
    positions: torch.Tensor  # int64 [n]
    chunks: list[SequenceChunk]
    residual: torch.Tensor  # float32 [n, hidden]; of `router.decoder` with more columns
    expert_input: torch.Tensor  # float32 [n, hidden]
    expert_output: torch.Tensor  # float32 [n, k, hidden]
    topk_ids: torch.Tensor  # int64 [n, k]
    topk_weights: torch.Tensor  # float32 [n, k]
    layer: int = 0

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.token_ids.shape[0]

    def expert_rows(self) -> HostRows:
        """Inputs and outputs of the layer's experts, as they are until `take_rows`."""
        hidden = self.expert_input.numpy()
        return HostRows(hidden, self.expert_output.numpy().reshape(-1, hidden.shape[1]))

    def take_rows(self, whole: MicroBatch, rows: torch.Tensor) -> None:
        """Become these rows (int64) of `whole`, at the same point of the same layer."""
        self.layer = whole.layer
        for name in ("residual", "expert_input", "expert_output", "topk_ids", "topk_weights"):
            torch.index_select(getattr(whole, name), 0, rows, out=getattr(self, name))
