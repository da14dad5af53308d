"""The grouped GEMMs on fp8 and MXFP4's scales are powers of two and go into the bf16 weight. An fp8 block's 128 of K get an accumulator of their own,
which is scaled and added by one fused multiply-add, in ascending order of K. So a row's bits depend on nothing else
here too, as long as a tile has at least 64 weight rows: below that Triton multiplies by mma.sync, with K in another
order for these. The weights are always the left operand, whose registers feed the product.

MXFP4 weights are repacked once (`pack_mxfp4`): 32 bytes hold 64 weights of a row, the first 32 in the low nibbles, and
the same 64 columns of all rows follow each other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_grouped_gemm import _locate, _swiglu
from kernels.triton_grouping import TILE_FIELDS

FP8_BLOCK = tl.constexpr(128)
MXFP4_GROUP = tl.constexpr(32)


@triton.jit
def _nibbles(packed, ASM: tl.constexpr):
    """The low and the high nibbles of bytes, e2m1 each, as bf16; as float32 in the interpreter, which knows no bf16.

    A nibble's exponent and mantissa bits, put where bf16 has its lowest exponent bits, read as the value times 2^-126.
    """
    if ASM:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, s, t, big;
            mov.b32 big, 0x7e807e80;
            prmt.b32 a, $4, 0, 0x4140;
            prmt.b32 b, $4, 0, 0x4342;
            shl.b32 s, a, 6;  and.b32 s, s, 0x01c001c0;  shl.b32 t, a, 12;  and.b32 t, t, 0x80008000;  or.b32 s, s, t;
            mul.rn.bf16x2 $0, s, big;
            shl.b32 s, b, 6;  and.b32 s, s, 0x01c001c0;  shl.b32 t, b, 12;  and.b32 t, t, 0x80008000;  or.b32 s, s, t;
            mul.rn.bf16x2 $1, s, big;
            shl.b32 s, a, 2;  and.b32 s, s, 0x01c001c0;  shl.b32 t, a, 8;  and.b32 t, t, 0x80008000;  or.b32 s, s, t;
            mul.rn.bf16x2 $2, s, big;
            shl.b32 s, b, 2;  and.b32 s, s, 0x01c001c0;  shl.b32 t, b, 8;  and.b32 t, t, 0x80008000;  or.b32 s, s, t;
            mul.rn.bf16x2 $3, s, big;
            }""",
            "=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
        return low, high
    else:
        return _e2m1(packed & 15), _e2m1(packed >> 4)


@triton.jit
def _e2m1(nibble):
    magnitude = (nibble & 7).to(tl.float32)
    value = tl.where(magnitude < 4, magnitude * 0.5, tl.where(magnitude < 6, magnitude - 2, magnitude * 2 - 8))
    return tl.where(nibble >= 8, -value, value)


@triton.jit
def _scales(scale_ptr, expert, row, k0, n_rows, depth, BLOCK_N: tl.constexpr, MXFP4: tl.constexpr, HIGH: tl.constexpr):
    """Scales of a weight block's step: a number for fp8, [BLOCK_N] for the low or high half of an MXFP4 step.

    fp8: [experts, n_rows / 128, depth / 128] float32.  MXFP4: [experts, depth / 32, n_rows] uint8.
    """
    if MXFP4:
        group = k0 // MXFP4_GROUP + HIGH
        rows = row + tl.arange(0, BLOCK_N)
        offset = (expert.to(tl.int64) * (depth // MXFP4_GROUP) + group) * n_rows + rows
        return tl.load(scale_ptr + offset, mask=(rows < n_rows) & (group < depth // MXFP4_GROUP), other=127)
    else:
        place = (expert * (n_rows // FP8_BLOCK) + row // FP8_BLOCK) * (depth // FP8_BLOCK) + k0 // FP8_BLOCK
        return tl.load(scale_ptr + place, mask=k0 < depth, other=1.0)


@triton.jit
def _by_power_of_two(values, scale):
    """values * 2^(scale - 127) in bf16, exactly; scale: e8m0, one per row."""
    if values.dtype == tl.bfloat16:
        bits = tl.where(scale == 0, 0x40, scale.to(tl.int16) << 7)  # 2^-127 is a subnormal bf16
        return values * bits.to(tl.bfloat16, bitcast=True)[:, None]
    else:
        bits = tl.where(scale == 0, 0x400000, scale.to(tl.int32) << 23)
        return (values * bits.to(tl.float32, bitcast=True)[:, None]).to(tl.bfloat16)


@triton.jit
def _step(acc, w_desc, expert, row, k0, n_rows, depth, x_low, x_high, low_scale, high_scale,
          MXFP4: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    if MXFP4:
        place = (expert * (depth // 64) + k0 // 64) * n_rows + row
        low, high = _nibbles(w_desc.load([place, 0]), ASM)
        acc = tl.dot(_by_power_of_two(low, low_scale), x_low.T, acc)
        return tl.dot(_by_power_of_two(high, high_scale), x_high.T, acc)
    else:
        product = tl.dot(w_desc.load([expert * n_rows + row, k0]).to(tl.bfloat16), x_low.T)
        return tl.fma(product, tl.full(acc.shape, 1.0, tl.float32) * low_scale, acc)


@triton.jit
def _products(
    x_ptrs, live, w_desc, scale_ptr, expert, row, second, n_rows, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MXFP4: tl.constexpr, ASM: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_M] of an expert's weight rows from `row` on, and with TWO from `second` on, times token rows.

    x_ptrs: [BLOCK_M, 32 or 128]. The pipeliner does not stage scales: each step fetches the next one's.
    """
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    other = acc
    low = _scales(scale_ptr, expert, row, 0, n_rows, depth, BLOCK_N, MXFP4, 0)
    high = _scales(scale_ptr, expert, row, 0, n_rows, depth, BLOCK_N, MXFP4, 1)
    other_low = _scales(scale_ptr, expert, second, 0, n_rows, depth, BLOCK_N, MXFP4, 0)
    other_high = _scales(scale_ptr, expert, second, 0, n_rows, depth, BLOCK_N, MXFP4, 1)
    step: tl.constexpr = 2 * MXFP4_GROUP if MXFP4 else FP8_BLOCK
    for k0 in range(0, depth, step):
        ahead = k0 + step
        next_low = _scales(scale_ptr, expert, row, ahead, n_rows, depth, BLOCK_N, MXFP4, 0)
        next_high = _scales(scale_ptr, expert, row, ahead, n_rows, depth, BLOCK_N, MXFP4, 1)
        x_low = tl.load(x_ptrs + k0, mask=live[:, None], other=0.0)
        x_high = x_low
        if MXFP4:
            x_high = tl.load(x_ptrs + k0 + MXFP4_GROUP, mask=live[:, None], other=0.0)
        acc = _step(acc, w_desc, expert, row, k0, n_rows, depth, x_low, x_high, low, high, MXFP4, ASM)
        low, high = next_low, next_high
        if TWO:
            next_low = _scales(scale_ptr, expert, second, ahead, n_rows, depth, BLOCK_N, MXFP4, 0)
            next_high = _scales(scale_ptr, expert, second, ahead, n_rows, depth, BLOCK_N, MXFP4, 1)
            other = _step(
                other, w_desc, expert, second, k0, n_rows, depth, x_low, x_high, other_low, other_high, MXFP4, ASM
            )
            other_low, other_high = next_low, next_high
    return acc, other


@triton.jit
def quantized_gate_up_kernel(
    x_ptr, x_stride, w_desc, scale_ptr, act_ptr, rows_ptr, tiles_ptr, num_tiles_ptr, hidden, intermediate,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr, MXFP4: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """As gate_up_kernel; w_desc: [experts * 2 * intermediate, hidden], MXFP4 [experts * hidden * intermediate / 32, 32]"""
    num_tiles = tl.load(num_tiles_ptr)
    n_blocks = tl.cdiv(intermediate, BLOCK_N)
    if tl.program_id(0) < num_tiles * n_blocks:
        tile, block_n = _locate(tl.program_id(0), tiles_ptr, n_blocks, GROUP_M)
        entry = tiles_ptr + TILE_FIELDS * tile
        start = tl.load(entry + 1)
        m = tl.arange(0, BLOCK_M)
        live = m < tl.load(entry + 2)
        token = tl.load(rows_ptr + start + m, mask=live, other=0)
        k = tl.arange(0, MXFP4_GROUP if MXFP4 else FP8_BLOCK)
        column = block_n * BLOCK_N
        gate, up = _products(
            x_ptr + token.to(tl.int64)[:, None] * x_stride + k[None, :], live, w_desc, scale_ptr, tl.load(entry),
            column, intermediate + column, 2 * intermediate, hidden, BLOCK_M, BLOCK_N, MXFP4, ASM, True,
        )  # fmt: skip
        act = _swiglu(gate, up, act_ptr.dtype.element_ty).T
        n = column + tl.arange(0, BLOCK_N)
        act_ptrs = act_ptr + (start + m).to(tl.int64)[:, None] * intermediate + n[None, :]
        tl.store(act_ptrs, act, mask=live[:, None] & (n < intermediate)[None, :])


@triton.jit
def quantized_down_kernel(
    act_ptr, w_desc, scale_ptr, out_ptr, out_stride, order_ptr, tiles_ptr, num_tiles_ptr, hidden, intermediate,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr, MXFP4: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """As down_kernel; w_desc: [experts * hidden, intermediate], MXFP4 [experts * intermediate * hidden / 64, 32]."""
    num_tiles = tl.load(num_tiles_ptr)
    n_blocks = tl.cdiv(hidden, BLOCK_N)
    if tl.program_id(0) < num_tiles * n_blocks:
        tile, block_n = _locate(tl.program_id(0), tiles_ptr, n_blocks, GROUP_M)
        entry = tiles_ptr + TILE_FIELDS * tile
        start = tl.load(entry + 1)
        m = tl.arange(0, BLOCK_M)
        live = m < tl.load(entry + 2)
        k = tl.arange(0, MXFP4_GROUP if MXFP4 else FP8_BLOCK)
        column = block_n * BLOCK_N
        acc, _ = _products(
            act_ptr + (start + m).to(tl.int64)[:, None] * intermediate + k[None, :], live, w_desc, scale_ptr,
            tl.load(entry), column, column, hidden, intermediate, BLOCK_M, BLOCK_N, MXFP4, ASM, False,
        )  # fmt: skip
        pair = tl.load(order_ptr + start + m, mask=live, other=0)
        n = column + tl.arange(0, BLOCK_N)
        out_ptrs = out_ptr + pair.to(tl.int64)[:, None] * out_stride + n[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty).T, mask=live[:, None] & (n < hidden)[None, :])
