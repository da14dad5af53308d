"""The MoE layer's gate: which experts a row goes to, and with which weights."""

from __future__ import annotations

import torch

from kernels.linear import PackedLinear
from router.model_config import MoEModelConfig


class Gate:
    """Scores, top-k by a stable sort (equal scores: the lower expert first), weights by softmax."""

    def __init__(self, weight: torch.Tensor, config: MoEModelConfig) -> None:
        """`weight` is [experts, hidden]."""
        # so narrow a product is twice as fast unpacked, and exact whatever the weights' type
        self._scores = PackedLinear(weight, "portable")
        self._top_k, self._normalize = config.top_k, config.normalize_topk

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[n, hidden] → expert ids int64 [n, k] and weights float32 [n, k], heaviest first."""
        scores, order = torch.sort(self._scores(x), dim=-1, descending=True, stable=True)
        ids = order.narrow(1, 0, self._top_k).contiguous()
        if self._normalize:  # softmax over all, then divided by the sum of the chosen: the softmax of the chosen
            return ids, torch.softmax(scores.narrow(1, 0, self._top_k), -1)
        return ids, torch.softmax(scores, -1).narrow(1, 0, self._top_k).contiguous()
