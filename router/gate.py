"""The MoE layer's gate: which experts a row goes to, and with which weights."""

from __future__ import annotations

import torch

from kernels.linear import Backend, PackedLinear
from router.model_config import MoEModelConfig


class Gate:
    """Scores, the k highest of each row, their weights by softmax.

    Which of equal scores comes first is up to `topk`, but always the same for a row: it works row by row.
    """

    def __init__(self, weight: torch.Tensor, config: MoEModelConfig, backend: Backend) -> None:
        """`weight` is [experts, hidden]."""
        self._scores = PackedLinear(weight, backend)
        self._top_k, self._normalize = config.top_k, config.normalize_topk

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """For `x` [n, hidden] fill expert `ids` int64 [n, k] and `weights` float32 [n, k], heaviest first."""
        scores = self._scores(x)
        if not self._normalize:
            scores = torch.softmax(scores, -1)
        torch.topk(scores, self._top_k, out=(weights, ids))
        if self._normalize:  # the softmax over all, divided by its sum over the chosen, is the softmax of the chosen
            torch.softmax(weights, -1, out=weights)
