"""Root-mean-square norm of the residual stream on a GPU: one program per row, so a row's bits are its own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, out_ptr, eps, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < size
    x = tl.load(x_ptr + row * size + column, mask=mask, other=0.0)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0)
    tl.store(out_ptr + row * size + column, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
    """out = x / sqrt(mean(x²) + eps) * weight, of each row of x.

    x: [n, size] float32; weight: [size] float32; out: [n, size] of the compute dtype; all contiguous.
    """
    rows, size = x.shape
    if out.shape != x.shape or not (x.is_contiguous() and out.is_contiguous()):
        raise ValueError(f"contiguous rows are wanted, got {tuple(x.shape)} and {tuple(out.shape)}")
    block = triton.next_power_of_2(size)
    _rms_norm_kernel[(rows,)](
        x, weight, out, eps, size, BLOCK=block,
        num_warps=min(max(block // 512, 1), 16), enable_fp_fusion=False,
    )  # fmt: skip
    return out
