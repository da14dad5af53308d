"""The grouped GEMMs on fp8 and MXFP4 weights, which become bf16 in registers, exactly, on their way into the product.

What one fp8 scale covers of K, 128, gets an accumulator of its own, which is scaled and added by one fused multiply-add
per element, in ascending order of K. An MXFP4 scale is a power of two and part of the widened weight, so that one
accumulator runs over K. So a row's bits depend on nothing else here too, as long
as a tile has at least 64 weight rows: below that Triton multiplies by mma.sync, with K in another order for these.
The weights are always the left operand, whose registers feed the product; gate and up rows are one operand.

Weights are repacked once (`quantized_weight.py`), so that a thread reads 16 bytes of a row at a time, and only its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_activation import add_bias, gated
from kernels.triton_grouped_gemm import _locate
from kernels.triton_grouping import TILE_FIELDS
from kernels.triton_widen import widen_fp8, widen_mxfp4

COLUMNS = tl.constexpr(128)  # of a row are stored together; what one fp8 scale covers


@triton.jit
def _fp8_scales(scale_ptr, expert, rows, k0, n_rows, depth):
    """[experts, n_rows / 128, depth / 128] float32."""
    place = (expert * (n_rows // COLUMNS) + rows // COLUMNS) * (depth // COLUMNS) + k0 // COLUMNS
    return tl.load(scale_ptr + place, mask=(rows < n_rows) & (k0 < depth), other=1.0)


@triton.jit
def _awaited(acc, ASM: tl.constexpr):
    """acc, read once more in each step. Without that Triton starts a product for every 16 columns while it widens the
    next, and ptxas, which cannot follow it, then waits for each of them (C7515)."""
    if ASM:
        acc = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [acc], dtype=tl.float32, is_pure=True, pack=1)
    return acc


@triton.jit
def _product(
    x_ptrs, live, w_desc, scales, expert, rows, column, n_rows, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    MXFP4: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """[PARTS * BLOCK_N, BLOCK_M]: BLOCK_N rows from `column` on of each of an expert's PARTS matrices times token rows.

    rows: their numbers among the expert's n_rows; x_ptrs: [BLOCK_M, BLOCK_K]; w_desc: [matrices by 128 columns, rows,
    words]. scales: MXFP4 a descriptor of [matrices by 128 columns, rows], fp8 a pointer. The pipeliner does not stage
    what a pointer reads here: each step fetches the next one's.
    """
    acc = tl.zeros((PARTS * BLOCK_N, BLOCK_M), tl.float32)
    first = expert * tl.cdiv(depth, COLUMNS) * PARTS
    if MXFP4:
        runs: tl.constexpr = BLOCK_K // COLUMNS
        k = tl.arange(0, BLOCK_K)
        for k0 in range(0, depth, BLOCK_K):
            x = tl.load(x_ptrs + k0, mask=live[:, None] & (k[None, :] < depth - k0), other=0.0)
            run = first + k0 // COLUMNS * PARTS
            packed = w_desc.load([run, column, 0]).reshape(runs, PARTS * BLOCK_N, 16).permute(1, 0, 2)
            step_scales = scales.load([run, column]).reshape(runs, PARTS * BLOCK_N).permute(1, 0)
            acc = tl.dot(widen_mxfp4(packed, step_scales, runs, ASM), x.T, acc)
            if BLOCK_M < 64:  # above, what is gained is lost by the registers that it takes
                acc = _awaited(acc, ASM)
        acc *= 65536.0  # what widened weights lack
    else:
        scale = _fp8_scales(scales, expert, rows, 0, n_rows, depth)
        for k0 in range(0, depth, COLUMNS):
            next_scale = _fp8_scales(scales, expert, rows, k0 + COLUMNS, n_rows, depth)
            x = tl.load(x_ptrs + k0, mask=live[:, None], other=0.0)
            packed = w_desc.load([first + k0 // COLUMNS * PARTS, column, 0]).reshape(PARTS * BLOCK_N, 32)
            product = tl.dot(widen_fp8(packed, ASM), x.T)
            acc = tl.fma(product, tl.broadcast_to(scale[:, None], acc.shape), acc)
            scale = next_scale
    return acc


@triton.jit
def quantized_gate_up_kernel(
    x_ptr, x_stride, w_desc, scales, bias_ptr, act_ptr, rows_ptr, tiles_ptr, num_tiles_ptr, hidden, intermediate,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    MXFP4: tl.constexpr, ASM: tl.constexpr, BIAS: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """As gate_up_kernel; BLOCK_N rows of gate and as many of up."""
    num_tiles = tl.load(num_tiles_ptr)
    n_blocks = tl.cdiv(intermediate, BLOCK_N)
    if tl.program_id(0) < num_tiles * n_blocks:
        tile, block_n = _locate(tl.program_id(0), tiles_ptr, n_blocks, GROUP_M)
        entry = tiles_ptr + TILE_FIELDS * tile
        start = tl.load(entry + 1)
        m = tl.arange(0, BLOCK_M)
        live = m < tl.load(entry + 2)
        token = tl.load(rows_ptr + start + m, mask=live, other=0)
        k = tl.arange(0, BLOCK_K)
        column = block_n * BLOCK_N
        r = tl.arange(0, 2 * BLOCK_N)
        both = _product(
            x_ptr + token.to(tl.int64)[:, None] * x_stride + k[None, :], live, w_desc, scales, tl.load(entry),
            column + r % BLOCK_N + (r // BLOCK_N) * intermediate, column, 2 * intermediate, hidden,
            BLOCK_M, BLOCK_N, BLOCK_K, 2, MXFP4, ASM,
        )  # fmt: skip
        gate, up = tl.split(both.reshape(2, BLOCK_N, BLOCK_M).permute(1, 2, 0))
        n = column + tl.arange(0, BLOCK_N)
        act = gated(gate, up, bias_ptr, tl.load(entry), n, intermediate, True, BIAS, LIMIT)
        act = act.to(act_ptr.dtype.element_ty).T
        act_ptrs = act_ptr + (start + m).to(tl.int64)[:, None] * intermediate + n[None, :]
        tl.store(act_ptrs, act, mask=live[:, None] & (n < intermediate)[None, :])


@triton.jit
def quantized_down_kernel(
    act_ptr, w_desc, scales, bias_ptr, out_ptr, out_stride, order_ptr, tiles_ptr, num_tiles_ptr,
    hidden, intermediate,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    MXFP4: tl.constexpr, ASM: tl.constexpr, BIAS: tl.constexpr, OUT_AT: tl.constexpr,
):  # fmt: skip
    """As down_kernel."""
    if OUT_AT:
        out_ptr = tl.multiple_of(tl.load(out_ptr).to(tl.pointer_type(tl.bfloat16)), 16)
    num_tiles = tl.load(num_tiles_ptr)
    n_blocks = tl.cdiv(hidden, BLOCK_N)
    if tl.program_id(0) < num_tiles * n_blocks:
        tile, block_n = _locate(tl.program_id(0), tiles_ptr, n_blocks, GROUP_M)
        entry = tiles_ptr + TILE_FIELDS * tile
        start = tl.load(entry + 1)
        m = tl.arange(0, BLOCK_M)
        live = m < tl.load(entry + 2)
        k = tl.arange(0, BLOCK_K)
        n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = _product(
            act_ptr + (start + m).to(tl.int64)[:, None] * intermediate + k[None, :], live, w_desc, scales,
            tl.load(entry), n, block_n * BLOCK_N, hidden, intermediate,
            BLOCK_M, BLOCK_N, BLOCK_K, 1, MXFP4, ASM,
        )  # fmt: skip
        if BIAS:
            acc = add_bias(acc, bias_ptr + tl.load(entry) * hidden, n, n < hidden, True)
        pair = tl.load(order_ptr + start + m, mask=live, other=0)
        out_ptrs = out_ptr + pair.to(tl.int64)[:, None] * out_stride + n[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty).T, mask=live[:, None] & (n < hidden)[None, :])
