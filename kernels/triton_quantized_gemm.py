"""The grouped GEMMs on fp8 and MXFP4 weights, which become bf16 in registers, exactly, on their way into the product.

What one fp8 scale covers of K, 128, gets an accumulator of its own, which is scaled and added by one fused multiply-add
per element, in ascending order of K. An MXFP4 scale is a power of two and part of the widened weight, so that one
accumulator runs over K. So a row's bits depend on nothing else here too, as long
as a tile has at least 64 weight rows: below that Triton multiplies by mma.sync, with K in another order for these.
The weights are always the left operand, whose registers feed the product; gate and up rows are one operand.

MXFP4 weights are repacked once (`pack_mxfp4`): a word holds those eight of a row's weights that one thread feeds to the
product, and the same 64 columns of all rows follow each other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_activation import add_bias, swiglu
from kernels.triton_grouped_gemm import _locate
from kernels.triton_grouping import TILE_FIELDS

FP8_BLOCK = tl.constexpr(128)
MXFP4_RUN = tl.constexpr(64)


@triton.jit
def _widen(packed, low_scale, high_scale, ASM: tl.constexpr):
    """[rows, 8] int32 of eight e2m1 each (see `pack_mxfp4`) times a scale for each half of a run: bf16 [rows, 64].

    A nibble's exponent and mantissa bits, put where bf16 has its lowest exponent bits, read as the value times 2^-126,
    which is part of the scale. One multiplication puts both them and the sign in place: its two copies do not touch.
    """
    rows: tl.constexpr = packed.shape[0]
    scale = tl.broadcast_to(tl.join(low_scale, high_scale)[:, :, None], (rows, 2, 4)).reshape(rows, 8)
    if ASM:
        a0, a1, b0, b1, c0, c1, d0, d1 = tl.inline_asm_elementwise(
            """{
            .reg .b32 s, w;
            and.b32 s, $8, 0x000f000f;  mul.lo.u32 s, s, 0x1040;  and.b32 s, s, 0x81c081c0;
            mul.rn.bf16x2 s, s, $9;
            mov.b32 {$0, $1}, s;
            and.b32 s, $8, 0x00f000f0;  mul.lo.u32 s, s, 0x0104;  and.b32 s, s, 0x81c081c0;
            mul.rn.bf16x2 s, s, $9;
            mov.b32 {$2, $3}, s;
            shr.u32 w, $8, 8;
            and.b32 s, w, 0x000f000f;  mul.lo.u32 s, s, 0x1040;  and.b32 s, s, 0x81c081c0;
            mul.rn.bf16x2 s, s, $9;
            mov.b32 {$4, $5}, s;
            and.b32 s, w, 0x00f000f0;  mul.lo.u32 s, s, 0x0104;  and.b32 s, s, 0x81c081c0;
            mul.rn.bf16x2 s, s, $9;
            mov.b32 {$6, $7}, s;
            }""",
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r",
            [packed, scale],
            dtype=(tl.bfloat16,) * 8,
            is_pure=True,
            pack=1,
        )
    else:
        factor = (scale << 16).to(tl.float32, bitcast=True)
        a0, a1 = _e2m1(packed, factor), _e2m1(packed >> 16, factor)
        b0, b1 = _e2m1(packed >> 4, factor), _e2m1(packed >> 20, factor)
        c0, c1 = _e2m1(packed >> 8, factor), _e2m1(packed >> 24, factor)
        d0, d1 = _e2m1(packed >> 12, factor), _e2m1(packed >> 28, factor)
    even = tl.join(tl.join(a0, c0), tl.join(b0, d0))
    odd = tl.join(tl.join(a1, c1), tl.join(b1, d1))
    # [rows, half of the run, word, c over a, b over a, odd]
    apart = tl.join(even, odd).reshape(rows, 2, 4, 2, 2, 2)
    return apart.permute(0, 1, 3, 4, 2, 5).reshape(rows, 64)


@triton.jit
def _e2m1(word, factor):
    nibble = word & 15
    magnitude = (nibble & 7).to(tl.float32)
    value = tl.where(magnitude < 4, magnitude * 0.5, tl.where(magnitude < 6, magnitude - 2, magnitude * 2 - 8))
    return (tl.where(nibble >= 8, -value, value) * 1.1754943508222875e-38 * factor).to(tl.bfloat16)


@triton.jit
def _mxfp4_scales(scale_ptr, expert, rows, k0, n_rows, depth):
    """Scales of weight rows for the 64 columns from k0 on: two int32, each a pair of bf16, 2^(110 + scale - 127).

    scale_ptr: [experts, depth / 64, n_rows] int16, the first 32 columns' exponent + 127 in the low byte.
    """
    inside = (rows < n_rows) & (k0 < depth)
    place = (expert.to(tl.int64) * (depth // 64) + k0 // 64) * n_rows + rows
    both = tl.load(scale_ptr + place, mask=inside, other=0).to(tl.int32)
    return (both & 255) * 0x00800080 + 0x37003700, ((both >> 8) & 255) * 0x00800080 + 0x37003700


@triton.jit
def _fp8_scales(scale_ptr, expert, rows, k0, n_rows, depth):
    """[experts, n_rows / 128, depth / 128] float32."""
    place = (expert * (n_rows // FP8_BLOCK) + rows // FP8_BLOCK) * (depth // FP8_BLOCK) + k0 // FP8_BLOCK
    return tl.load(scale_ptr + place, mask=(rows < n_rows) & (k0 < depth), other=1.0)


@triton.jit
def _product(
    x_ptrs, live, w_desc, scale_ptr, expert, rows, column, n_rows, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, MXFP4: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """[PARTS * BLOCK_N, BLOCK_M]: BLOCK_N rows from `column` on of each of an expert's PARTS matrices times token rows.

    rows: their numbers among the expert's n_rows; x_ptrs: [BLOCK_M, 64 or 128]; w_desc: [matrices, rows, depth], MXFP4
    [matrices by 64 columns, rows, 8] int32. The pipeliner does not stage scales: each step fetches the next one's.
    """
    acc = tl.zeros((PARTS * BLOCK_N, BLOCK_M), tl.float32)
    if MXFP4:
        low_scale, high_scale = _mxfp4_scales(scale_ptr, expert, rows, 0, n_rows, depth)
        for k0 in range(0, depth, 64):
            next_low, next_high = _mxfp4_scales(scale_ptr, expert, rows, k0 + 64, n_rows, depth)
            x = tl.load(x_ptrs + k0, mask=live[:, None], other=0.0)
            run = (expert * (depth // 64) + k0 // 64) * PARTS
            packed = w_desc.load([run, column, 0]).reshape(PARTS * BLOCK_N, 8)
            acc = tl.dot(_widen(packed, low_scale, high_scale, ASM), x.T, acc)
            low_scale, high_scale = next_low, next_high
        acc *= 65536.0  # what the scales lack
    else:
        scale = _fp8_scales(scale_ptr, expert, rows, 0, n_rows, depth)
        for k0 in range(0, depth, FP8_BLOCK):
            next_scale = _fp8_scales(scale_ptr, expert, rows, k0 + FP8_BLOCK, n_rows, depth)
            x = tl.load(x_ptrs + k0, mask=live[:, None], other=0.0)
            w = w_desc.load([expert * PARTS, column, k0]).reshape(PARTS * BLOCK_N, FP8_BLOCK)
            w = w.to(tl.float32).to(tl.bfloat16)  # by way of float32: the direct conversion is 16 a cycle
            product = tl.dot(w, x.T)
            acc = tl.fma(product, tl.broadcast_to(scale[:, None], acc.shape), acc)
            scale = next_scale
    return acc


@triton.jit
def quantized_gate_up_kernel(
    x_ptr, x_stride, w_desc, scale_ptr, bias_ptr, act_ptr, rows_ptr, tiles_ptr, num_tiles_ptr, hidden, intermediate,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr, MXFP4: tl.constexpr, ASM: tl.constexpr,
    BIAS: tl.constexpr, LIMIT: tl.constexpr,
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
        k = tl.arange(0, MXFP4_RUN if MXFP4 else FP8_BLOCK)
        column = block_n * BLOCK_N
        r = tl.arange(0, 2 * BLOCK_N)
        both = _product(
            x_ptr + token.to(tl.int64)[:, None] * x_stride + k[None, :], live, w_desc, scale_ptr, tl.load(entry),
            column + r % BLOCK_N + (r // BLOCK_N) * intermediate, column, 2 * intermediate, hidden,
            BLOCK_M, BLOCK_N, 2, MXFP4, ASM,
        )  # fmt: skip
        gate, up = tl.split(both.reshape(2, BLOCK_N, BLOCK_M).permute(1, 2, 0))
        n = column + tl.arange(0, BLOCK_N)
        if BIAS:
            expert_bias_ptr = bias_ptr + tl.load(entry) * 2 * intermediate
            gate = add_bias(gate, expert_bias_ptr, n, n < intermediate, True)
            up = add_bias(up, expert_bias_ptr + intermediate, n, n < intermediate, True)
        act = swiglu(gate, up, LIMIT).to(act_ptr.dtype.element_ty).T
        act_ptrs = act_ptr + (start + m).to(tl.int64)[:, None] * intermediate + n[None, :]
        tl.store(act_ptrs, act, mask=live[:, None] & (n < intermediate)[None, :])


@triton.jit
def quantized_down_kernel(
    act_ptr, w_desc, scale_ptr, bias_ptr, out_ptr, out_stride, order_ptr, tiles_ptr, num_tiles_ptr,
    hidden, intermediate,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr, MXFP4: tl.constexpr, ASM: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """As down_kernel."""
    num_tiles = tl.load(num_tiles_ptr)
    n_blocks = tl.cdiv(hidden, BLOCK_N)
    if tl.program_id(0) < num_tiles * n_blocks:
        tile, block_n = _locate(tl.program_id(0), tiles_ptr, n_blocks, GROUP_M)
        entry = tiles_ptr + TILE_FIELDS * tile
        start = tl.load(entry + 1)
        m = tl.arange(0, BLOCK_M)
        live = m < tl.load(entry + 2)
        k = tl.arange(0, MXFP4_RUN if MXFP4 else FP8_BLOCK)
        n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = _product(
            act_ptr + (start + m).to(tl.int64)[:, None] * intermediate + k[None, :], live, w_desc, scale_ptr,
            tl.load(entry), n, block_n * BLOCK_N, hidden, intermediate, BLOCK_M, BLOCK_N, 1, MXFP4, ASM,
        )  # fmt: skip
        if BIAS:
            acc = add_bias(acc, bias_ptr + tl.load(entry) * hidden, n, n < hidden, True)
        pair = tl.load(order_ptr + start + m, mask=live, other=0)
        out_ptrs = out_ptr + pair.to(tl.int64)[:, None] * out_stride + n[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty).T, mask=live[:, None] & (n < hidden)[None, :])
