"""The arithmetic of going on without an expert: its output is left out, the weights of the row's others grow.

Row by row and in top-k order, so that a row's result depends neither on the batch nor on where the rest was computed.
"""

from __future__ import annotations

import torch


def leave_out(weights: torch.Tensor, missing: torch.Tensor) -> None:
    """Drop the experts of the `missing` slots (row × k + j) from their rows, in place; their outputs must be zeros.

    `weights` is float32 [n, k], on any device. The sum of a row's weights stays what it was: 1 where the gate
    normalises, else less. Rows that `hopeless` names must not be among them.
    """
    gone = _mask(weights, missing)
    left = weights.masked_fill(gone, 0.0)
    scale = _row_sums(weights) / _row_sums(left)
    weights.copy_(torch.where(gone.any(1, keepdim=True), left * scale.unsqueeze(1), weights))


def hopeless(weights: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
    """The rows of which no expert that counts is left: int64, ascending, on the host."""
    gone = _mask(weights, missing)
    return (gone.any(1) & (_row_sums(weights.masked_fill(gone, 0.0)) <= 0)).nonzero().flatten().cpu()


def _mask(weights: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(weights.numel(), dtype=torch.bool, device=weights.device)
    mask[slots.to(weights.device)] = True
    return mask.view(weights.shape)


def _row_sums(weights: torch.Tensor) -> torch.Tensor:
    """Added up in top-k order; a library's sum may take another one for other shapes."""
    total = weights[:, 0].clone()
    for j in range(1, weights.shape[1]):
        total += weights[:, j]
    return total
