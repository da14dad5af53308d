"""Sum of a token's expert rows in top-k order, as the router does it; into a new tensor or onto the residual stream."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _combine_kernel(
    pair_rows_ptr, weights_ptr, experts_ptr, out_ptr, hidden,
    TOP_K: tl.constexpr, SKIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < hidden
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(TOP_K):
        pair = row * TOP_K + slot
        present = mask
        if SKIP:
            present = mask & (tl.load(experts_ptr + pair) >= 0)
        value = tl.load(pair_rows_ptr + pair * hidden + column, mask=present, other=0.0).to(tl.float32)
        total += tl.load(weights_ptr + pair) * value
    tl.store(out_ptr + row * hidden + column, total.to(out_ptr.dtype.element_ty), mask=mask)


def combine(pair_rows: torch.Tensor, topk_weights: torch.Tensor, experts: torch.Tensor | None = None) -> torch.Tensor:
    """out[n] = sum over j of topk_weights[n, j] * pair_rows[n * top_k + j], multiplied, then added by rising j, fp32.

    pair_rows: [rows * top_k, hidden]; topk_weights: [rows, top_k] float32. Returns [rows, hidden] of pair_rows' dtype.
    experts: [rows * top_k] int32; rows of pairs whose expert is negative count as zeros, and are not read.
    """
    rows, top_k = topk_weights.shape
    hidden = pair_rows.shape[1]
    if pair_rows.shape[0] != rows * top_k or not pair_rows.is_contiguous() or not topk_weights.is_contiguous():
        raise ValueError(f"contiguous [{rows * top_k}, hidden] pair rows wanted, got {tuple(pair_rows.shape)}")
    out = pair_rows.new_empty(rows, hidden)
    block = 1024
    options = {"enable_fp_fusion": False}  # an fma would round once where the router's reference rounds twice
    _combine_kernel[(rows, triton.cdiv(hidden, block))](
        pair_rows,
        topk_weights,
        topk_weights if experts is None else experts,
        out,
        hidden,
        TOP_K=top_k,
        SKIP=experts is not None,
        BLOCK=block,
        **options,
    )
    return out


@triton.jit
def _add_combined_kernel(
    residual_ptr, pairs_ptr, weights_ptr, hidden, TOP_K: tl.constexpr, ADDRESSES: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < hidden
    total = tl.load(residual_ptr + row * hidden + column, mask=mask, other=0.0)
    for slot in tl.static_range(TOP_K):
        pair = row * TOP_K + slot
        present = mask
        if ADDRESSES:
            address = tl.load(pairs_ptr + pair)
            present = mask & (address != 0)
            values_ptr = tl.multiple_of(address.to(tl.pointer_type(tl.bfloat16)), 16)
        else:
            values_ptr = pairs_ptr + pair * hidden
        value = tl.load(values_ptr + column, mask=present, other=0.0).to(tl.float32)
        total += tl.load(weights_ptr + pair) * value
    tl.store(residual_ptr + row * hidden + column, total, mask=mask)


def add_combined(residual: torch.Tensor, pair_rows: torch.Tensor, topk_weights: torch.Tensor) -> None:
    """residual[n] += topk_weights[n, j] * pair_rows[n * top_k + j], for rising j, multiplied, then added, in float32.

    residual: [rows, hidden] float32; pair_rows: [rows * top_k, hidden] of any float dtype; topk_weights: [rows, top_k].
    """
    rows, top_k = topk_weights.shape
    hidden = residual.shape[1]
    if pair_rows.shape != (rows * top_k, hidden) or not pair_rows.is_contiguous():
        raise ValueError(f"contiguous [{rows * top_k}, {hidden}] pair rows wanted, got {tuple(pair_rows.shape)}")
    _add(residual, pair_rows, topk_weights, addresses=False)


def add_combined_at(residual: torch.Tensor, addresses: torch.Tensor, topk_weights: torch.Tensor) -> None:
    """The same for pair rows that lie anywhere that the GPU can read, bf16, multiples of 16 bytes from each other.

    addresses: int64 [rows * top_k], of each pair's row; 0 for a row of zeros.
    """
    rows, top_k = topk_weights.shape
    if addresses.shape != (rows * top_k,) or addresses.dtype != torch.int64:
        raise ValueError(f"int64 addresses of {rows * top_k} pairs wanted, got {addresses.dtype} {addresses.shape}")
    if residual.shape[1] % 8:
        raise ValueError(f"rows of {residual.shape[1]} bf16 values are not multiples of 16 bytes")
    _add(residual, addresses, topk_weights, addresses=True)


def _add(residual: torch.Tensor, pairs: torch.Tensor, topk_weights: torch.Tensor, *, addresses: bool) -> None:
    if not residual.is_contiguous() or not topk_weights.is_contiguous():
        raise ValueError("residual and weights must be contiguous")
    (rows, hidden), block = residual.shape, 512
    _add_combined_kernel[(rows, triton.cdiv(hidden, block))](
        residual, pairs, topk_weights, hidden,
        TOP_K=topk_weights.shape[1], ADDRESSES=addresses, BLOCK=block, enable_fp_fusion=False,
    )  # fmt: skip
