"""Root-mean-square norm in few calls: at one row the calls, not the arithmetic, take the time."""

from __future__ import annotations

import math

import torch

_ALIGN = 16  # floats in a vector register


class RMSNorm:
    """`x / sqrt(mean(x²) + eps) * weight` over the last dimension.

    The mean's division is folded into weight and eps: x / sqrt(sum(x²) + n·eps) · weight·sqrt(n).
    """

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        """`weight` has the size of the last dimension, or more leading dimensions that broadcast against x."""
        self._size = weight.shape[-1]
        self._weight = weight.float() * math.sqrt(self._size)
        self._eps = eps * self._size

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write the norm of `x` to `out`, which has x's shape and may be x itself; return `out`."""
        scale = torch.mul(x, x).sum(-1, keepdim=True).add_(self._eps).rsqrt_()
        return torch.mul(x, scale, out=out).mul_(self._weight)

    def of_stream(self, stream: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The same for rows made by `new_stream`, in three calls instead of six; `out` is [n, size]."""
        torch.div(stream.narrow(1, 0, self._size), torch.linalg.vector_norm(stream, 2, 1, True), out=out)
        return out.mul_(self._weight)


def new_stream(rows: torch.Tensor, eps: float) -> torch.Tensor:
    """A copy of `rows` [n, size] with columns added, [n, width]: one sqrt(n·eps), the others 0.

    The length of such a row is sqrt(sum(x²) + n·eps), all that a norm needs; whoever adds to the first columns alone
    keeps it so.
    """
    count, size = rows.shape
    stream = torch.zeros(count, size + _ALIGN - size % _ALIGN)
    stream[:, :size] = rows
    stream[:, size] = math.sqrt(size * eps)
    return stream
