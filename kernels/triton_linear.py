"""Linear layers on a GPU whose rows do not depend on each other; cuBLAS chooses another order of K by row count.

As in `triton_grouped_gemm`: one accumulator per output element, K upwards, no split-K. So every tiling gives the same
bits, and which one is used is a matter of speed alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.triton_grouped_gemm import multiply, zeros


@dataclass(frozen=True)
class LinearTiling:
    """block_m rows by block_n columns; block_k per step; swap: weights are the left operand (at least 64 of them)."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    swap: bool = False
    group_m: int = 8


_GATE = LinearTiling(16, 64, 256, 4, 3, swap=True)
_NARROW_FEW = LinearTiling(16, 16, 256, 2, 4)
_WIDE_FEW = LinearTiling(16, 64, 128, 4, 4, swap=True)
_WIDE_SOME = LinearTiling(32, 64, 128, 4, 4, swap=True)
_NARROW_MANY = LinearTiling(64, 64, 128, 4, 3, swap=True)
_WIDE_MANY = LinearTiling(64, 128, 64, 4, 4)
_LARGE = LinearTiling(128, 128, 64, 8, 4)
GATE_COLUMNS, NARROW_COLUMNS = 512, 4096


def choose_linear_tiling(rows: int, columns: int) -> LinearTiling:
    """The tiling for a product of `rows` rows; docs/kernels.md has the measurements behind it."""
    narrow = columns <= NARROW_COLUMNS
    if rows <= 64:
        if columns <= GATE_COLUMNS or (narrow and rows > 32):
            return _GATE
        if narrow:
            return _NARROW_FEW
        return _WIDE_FEW if rows <= 16 else _WIDE_SOME
    if rows <= 512:
        return _NARROW_MANY if narrow else _WIDE_MANY
    return _LARGE


@triton.jit
def linear_kernel(
    x_ptr, x_stride, w_desc, out_ptr, out_stride, rows, columns, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SWAP: tl.constexpr, EVEN_K: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """out = x @ w.T, or out += x @ w.T with ADD; w_desc: [columns, depth]."""
    n_blocks = tl.cdiv(columns, BLOCK_N)
    per_group = GROUP_M * n_blocks  # some row tiles share each weight block before the next one
    first = (tl.program_id(0) // per_group) * GROUP_M
    height = tl.minimum(tl.cdiv(rows, BLOCK_M) - first, GROUP_M)
    inside = tl.program_id(0) % per_group
    m = (first + inside % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (inside // height) * BLOCK_N
    live = m < rows
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + m.to(tl.int64)[:, None] * x_stride + k[None, :]
    acc = zeros(BLOCK_M, BLOCK_N, SWAP)
    for k0 in range(0, depth, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs + k0, mask=live[:, None], other=0.0)
        else:
            x = tl.load(x_ptrs + k0, mask=live[:, None] & (k[None, :] < depth - k0), other=0.0)
        acc = multiply(x, w_desc.load([column, k0]), acc, SWAP)
    if SWAP:
        acc = acc.T
    n = column + tl.arange(0, BLOCK_N)
    out_ptrs = out_ptr + m.to(tl.int64)[:, None] * out_stride + n[None, :]
    mask = live[:, None] & (n < columns)[None, :]
    if ADD:
        acc += tl.load(out_ptrs, mask=mask, other=0.0)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


class Linear:
    """`x @ weight.T`; a row's bits are the same at every number of rows."""

    def __init__(self, weight: torch.Tensor) -> None:
        """`weight`: [columns, depth], contiguous, used in place; depth a multiple of 8 (TMA moves 16 bytes)."""
        if weight.ndim != 2 or not weight.is_contiguous() or weight.shape[1] % 8:
            raise ValueError(f"a contiguous weight with a depth that 8 divides is wanted, got {tuple(weight.shape)}")
        self.weight = weight
        self.columns, self.depth = weight.shape
        self._descriptors: dict[tuple[int, int], TensorDescriptor] = {}

    def __call__(
        self, x: torch.Tensor, out: torch.Tensor, add: bool = False, tiling: LinearTiling | None = None
    ) -> torch.Tensor:
        """x [n, depth] of the weights' dtype → `out` [n, columns] of any float dtype; `add`: onto what is there."""
        if x.ndim != 2 or x.shape[1] != self.depth or x.stride(1) != 1 or x.dtype != self.weight.dtype:
            raise ValueError(f"x is {tuple(x.shape)} {x.dtype}, want [n, {self.depth}] {self.weight.dtype}")
        if out.shape != (x.shape[0], self.columns) or out.stride(1) != 1:
            raise ValueError(f"out is {tuple(out.shape)}, want {(x.shape[0], self.columns)} with contiguous rows")
        t = tiling or choose_linear_tiling(x.shape[0], self.columns)
        grid = (triton.cdiv(x.shape[0], t.block_m) * triton.cdiv(self.columns, t.block_n),)
        linear_kernel[grid](
            x, x.stride(0), self._descriptor(t), out, out.stride(0), x.shape[0], self.columns, self.depth,
            BLOCK_M=t.block_m, BLOCK_N=t.block_n, BLOCK_K=t.block_k, GROUP_M=t.group_m, SWAP=t.swap,
            EVEN_K=self.depth % t.block_k == 0, ADD=add, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
        return out

    def _descriptor(self, tiling: LinearTiling) -> TensorDescriptor:
        box = (tiling.block_n, tiling.block_k)
        if box not in self._descriptors:
            self._descriptors[box] = TensorDescriptor.from_tensor(self.weight, list(box))
        return self._descriptors[box]
