"""Products with fp8 and MXFP4 weights, which become bf16 in registers, exactly, on their way into the product.

What one fp8 scale covers of K, 128, gets an accumulator of its own, which is scaled and added by one fused multiply-add
per element, in ascending order of K. An MXFP4 scale is a power of two and part of the widened weight, so that one
accumulator runs over K. So a row's bits depend on nothing else here too, as long as a tile has at least 64 weight rows:
below that Triton multiplies by mma.sync, with K in another order for these.
The weights are always the left operand, whose registers feed the product; gate and up rows are one operand.

Weights are repacked once (`quantized_weight.py`), so that a thread reads 16 bytes of a row at a time, and only its own.

Both products: [PARTS * BLOCK_N, BLOCK_M], BLOCK_N rows from `column` on of each of an expert's PARTS matrices [ROWS,
DEPTH], times token rows, which `load_rows` describes. w_desc: [matrices by 128 columns, rows, words].
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_handover import load_rows
from kernels.triton_widen import widen_fp8, widen_mxfp4

COLUMNS = tl.constexpr(128)  # of a row are stored together; what one fp8 scale covers


@triton.jit
def fp8_product(
    row_ptrs, live, w_desc, scale_ptr, expert, column, counter_ptr, wanted, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr,
    WAIT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """scale_ptr: [experts, PARTS * ROWS / 128, DEPTH / 128] float32; BLOCK_N rows have one of each step.

    The pipeliner does not stage what a pointer reads here: each step fetches the next one's.
    """
    tl.static_assert(BLOCK_K == COLUMNS and COLUMNS % BLOCK_N == 0)
    steps: tl.constexpr = DEPTH // COLUMNS
    to_up: tl.constexpr = (PARTS - 1) * (ROWS // COLUMNS) * steps
    scale_ptr += (expert * PARTS * (ROWS // COLUMNS) + column // COLUMNS) * steps
    is_gate = (tl.arange(0, PARTS * BLOCK_N) < BLOCK_N)[:, None]
    acc = tl.zeros((PARTS * BLOCK_N, BLOCK_M), tl.float32)
    scale = tl.load(scale_ptr)
    up_scale = tl.load(scale_ptr + to_up)
    for k0 in tl.range(0, DEPTH, BLOCK_K, num_stages=STAGES):
        step = k0 // BLOCK_K
        more = step + 1 < steps
        next_scale = tl.load(scale_ptr + step + 1, mask=more, other=1.0)
        next_up_scale = tl.load(scale_ptr + to_up + step + 1, mask=more, other=1.0)
        packed = w_desc.load([(expert * steps + step) * PARTS, column, 0]).reshape(PARTS * BLOCK_N, 32)
        x = load_rows(row_ptrs, live, k0, counter_ptr, wanted, DEPTH, BLOCK_K, WAIT)
        product = tl.dot(widen_fp8(packed, ASM), x.T)
        if PARTS == 2:
            acc = tl.fma(product, tl.broadcast_to(tl.where(is_gate, scale, up_scale), acc.shape), acc)
        else:
            acc = tl.fma(product, tl.full(acc.shape, scale, tl.float32), acc)
        scale = next_scale
        up_scale = next_up_scale
    return acc


@triton.jit
def _awaited(acc, ASM: tl.constexpr):
    """acc, read once more in each step. Without that Triton starts a product for every 16 columns while it widens the
    next, and ptxas, which cannot follow it, then waits for each of them (C7515)."""
    if ASM:
        acc = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [acc], dtype=tl.float32, is_pure=True, pack=1)
    return acc


@triton.jit
def _hidden(number, ASM: tl.constexpr):
    """The number, which the compiler does not know any more: a loop of so many steps then takes fewer registers."""
    if ASM:
        number = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [number], dtype=tl.int32, is_pure=True, pack=1)
    return number


@triton.jit
def mxfp4_product(
    row_ptrs, live, w_desc, scales_desc, expert, column, counter_ptr, wanted, DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr,
    WAIT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """scales_desc: [matrices by 128 columns, rows]."""
    runs: tl.constexpr = BLOCK_K // COLUMNS
    acc = tl.zeros((PARTS * BLOCK_N, BLOCK_M), tl.float32)
    first = expert * ((DEPTH + COLUMNS - 1) // COLUMNS) * PARTS
    depth = DEPTH
    if BLOCK_M >= 64:  # spills half as much under a cap
        depth = _hidden(DEPTH, ASM)
    for k0 in tl.range(0, depth, BLOCK_K, num_stages=STAGES):
        run = first + k0 // COLUMNS * PARTS
        packed = w_desc.load([run, column, 0]).reshape(runs, PARTS * BLOCK_N, 16).permute(1, 0, 2)
        scales = scales_desc.load([run, column]).reshape(runs, PARTS * BLOCK_N).permute(1, 0)
        scales = tl.broadcast_to(scales[:, :, None], (PARTS * BLOCK_N, runs, 4))
        x = load_rows(row_ptrs, live, k0, counter_ptr, wanted, DEPTH, BLOCK_K, WAIT)
        acc = tl.dot(widen_mxfp4(packed, scales, runs, ASM), x.T, acc)
        if BLOCK_M < 64:  # above, what is gained is lost by the registers that it takes
            acc = _awaited(acc, ASM)
    return acc * 65536.0  # what widened weights lack
