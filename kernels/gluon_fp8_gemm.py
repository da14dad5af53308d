"""The two grouped GEMMs on fp8 weights for many rows per expert, warp-specialised: in Gluon, for Hopper.

A program has the multiprocessor to itself and strides over work items, a tile of up to 128 rows by a block of 128
weight rows each (64 of gate and as many of up, or 128 of down):

* one group of warps loads: step after step of 128 of K, item after item, into a ring of slots in shared memory;
* two groups multiply, each half of the weight rows. A thread widens the words of its own rows from shared memory to
  bf16 registers, the left operand, so that each weight is widened once for up to 128 rows. While one group widens and
  scales, the other one's products keep the tensor cores busy.

A tile takes the time of the next multiple of 32 rows: there is a loop for each. Barriers: see `gluon_grouped_gemm`.

The bits are those of `triton_quantized_gemm`: each 128 of K has an accumulator of its own, 16 at a time upwards, which
one fused multiply-add per element scales and adds; the functions after it are the same.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.gluon_grouped_gemm import SHARED, advance, locate
from kernels.quantized_weight import QuantizedWeight
from kernels.triton_activation import add_bias, gated
from kernels.triton_grouping import Grouping
from kernels.triton_tiling import Tiling
from kernels.triton_widen import widen_fp8

WORDS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32))
"""Of the weights, 32 words in a row."""
BLOCK_M = gl.constexpr(128)
"""Rows of a tile, at most."""
BOX = gl.constexpr(32)
"""Rows that one TMA loads."""
HALF = gl.constexpr(64)
"""Of a step's 128 of K: what swizzled rows of 128 bytes hold."""


def admits(w13: QuantizedWeight) -> bool:
    """Whether the kernel can multiply by such weights: fp8, compiled, on Hopper."""
    return (
        not w13.mxfp4
        and w13.data.is_cuda
        and not triton.knobs.runtime.interpret
        and torch.cuda.get_device_capability(w13.data.device) == (9, 0)
    )


@gluon.constexpr_function
def accumulator_layout(n):
    """Of 64 weight rows by n tile rows."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, n, 16])


@gluon.constexpr_function
def words_layout(parts):
    """Of 64 / parts weight rows by 32 words: a thread has the words that it feeds to the tensor cores."""
    rows = [[8, 0], [16, 0], [32, 0]]
    own, warps = ([], rows[:2]) if parts == 2 else (rows[:1], rows[1:])
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [0, 4], *own], lanes, warps, [], [64 // parts, 32])


@gluon.constexpr_function
def store_layout(n, parts):
    """Of n tile rows by 64 / parts columns: a warp keeps the columns that it multiplied, a thread stores 16 bytes."""
    rows = [[1, 0], [2, 0], [4, 0], [8, 0], [16, 0], [32, 0], [64, 0]][: n.bit_length() - 1]
    own, columns = [[0, 1], [0, 2], [0, 4]], [[0, 8], [0, 16], [0, 32]]
    if parts == 2:
        return gl.DistributedLinearLayout([*own, *rows[5:]], rows[:5], columns[:2], [], [n, 32])
    return gl.DistributedLinearLayout([*own, *rows[4:]], [columns[0], *rows[:4]], columns[1:], [], [n, 64])


@gluon.jit
def _load(
    x, x_stride, w_desc, rows_ptr, tiles_ptr, num_tiles_ptr, depth, columns, a, b, full, empty,
    GATE_UP: gl.constexpr, GROUP_M: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The producer."""
    STAGES: gl.constexpr = a.shape[0]
    PARTS: gl.constexpr = 2 if GATE_UP else 1
    BLOCK_N: gl.constexpr = a.shape[1] // PARTS
    n_blocks = columns // BLOCK_N
    total = gl.load(num_tiles_ptr) * n_blocks
    steps = depth // 128
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])  # 16 bytes of a thread
    m = gl.arange(0, BLOCK_M // 2, gl.SliceLayout(1, layout))
    k = gl.arange(0, HALF, gl.SliceLayout(0, layout))
    slot = 0
    parity = 1
    for index in range(gl.program_id(0), total, gl.num_programs(0)):
        expert, start, rows, block_n = locate(index, total, tiles_ptr, n_blocks, GROUP_M)
        w_row = expert * steps * PARTS * columns + block_n * BLOCK_N
        boxes = gl.cdiv(rows, BOX)
        if GATE_UP:
            upper = gl.load(rows_ptr + start + m, mask=m < rows, other=0)
            lower = gl.load(rows_ptr + start + m + BLOCK_M // 2, mask=m + BLOCK_M // 2 < rows, other=0)
            upper_ptrs = x + gl.expand_dims(upper.to(gl.int64) * x_stride, 1) + gl.expand_dims(k, 0)
            lower_ptrs = x + gl.expand_dims(lower.to(gl.int64) * x_stride, 1) + gl.expand_dims(k, 0)
            upper_live = gl.expand_dims(m < rows, 1)
            lower_live = gl.expand_dims(m + BLOCK_M // 2 < rows, 1)
        for step in range(steps):
            mbarrier.wait(empty.index(slot), parity)
            bar = full.index(slot)
            words = a.index(slot)
            if GATE_UP:
                mbarrier.expect(bar, 2 * BLOCK_N * 128)
                tma.async_copy_global_to_shared(w_desc, [w_row, 0], bar, words.slice(0, BLOCK_N))
                tma.async_copy_global_to_shared(w_desc, [w_row + columns, 0], bar, words.slice(BLOCK_N, BLOCK_N))
                for half in gl.static_range(2):
                    k0 = step * 128 + half * HALF
                    to = b.index(2 * slot + half)
                    async_copy.async_copy_global_to_shared(
                        to.slice(0, BLOCK_M // 2), upper_ptrs + k0, mask=upper_live
                    )  # fmt: skip
                    if rows > BLOCK_M // 2:
                        async_copy.async_copy_global_to_shared(
                            to.slice(BLOCK_M // 2, BLOCK_M // 2), lower_ptrs + k0, mask=lower_live
                        )
                async_copy.mbarrier_arrive(bar, increment_count=False)
            else:  # rows past the tile belong to others: they are read, and their products not stored
                for box in gl.static_range(BLOCK_M // BOX):
                    mbarrier.expect(bar, BLOCK_N * 128 + (box + 1) * BOX * 256, pred=boxes == box + 1)
                tma.async_copy_global_to_shared(w_desc, [w_row, 0], bar, words)
                for box in gl.static_range(BLOCK_M // BOX):
                    for half in gl.static_range(2):
                        tma.async_copy_global_to_shared(
                            x, [start + box * BOX, step * 128 + half * HALF], bar,
                            b.index(2 * slot + half).slice(box * BOX, BOX), pred=box < boxes,
                        )  # fmt: skip
            w_row += PARTS * columns
            slot, parity = advance(slot, parity, 1, STAGES)


@gluon.jit
def _widened(words, CONSUMER: gl.constexpr, GATE_UP: gl.constexpr):
    """This consumer's 64 weight rows of a slot, both halves of K. Of gate and up 8 rows of each lie in turn, so that a
    thread has both of a column."""
    if GATE_UP:
        gate = words.slice(CONSUMER * 32, 32).load(words_layout(2))
        up = words.slice(64 + CONSUMER * 32, 32).load(words_layout(2))
        own = gl.join(gate, up).reshape([4, 8, 32, 2]).permute((0, 3, 1, 2)).reshape([64, 32])
    else:
        own = words.slice(CONSUMER * 64, 64).load(words_layout(1))
    return widen_fp8(own, True).reshape([64, 2, HALF]).permute((0, 2, 1)).split()


@gluon.jit
def _start_product(w0, w1, b, slot, FIRST: gl.constexpr, N: gl.constexpr):
    """Start the product of one step with N rows of the tile, from FIRST on."""
    layout: gl.constexpr = accumulator_layout(N)
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    product = gl.zeros((64, N), gl.float32, layout)
    x = b.index(2 * slot).slice(FIRST, N).permute((1, 0))
    product = warpgroup_mma(gl.convert_layout(w0, operand), x, product, use_acc=False, is_async=True)
    x = b.index(2 * slot + 1).slice(FIRST, N).permute((1, 0))
    return warpgroup_mma(gl.convert_layout(w1, operand), x, product, is_async=True)


@gluon.jit
def _add_scaled(acc, product, scale, up_scale, GATE_UP: gl.constexpr):
    if GATE_UP:
        row = gl.arange(0, 64, gl.SliceLayout(1, acc.type.layout))
        scale = gl.expand_dims(gl.where((row & 8) == 0, scale, up_scale), 1).broadcast_to(acc.shape)
    else:
        scale = gl.full(acc.shape, scale, gl.float32, acc.type.layout)
    return gl.fma(product, scale, acc)


@gluon.jit
def _store(
    acc, FIRST: gl.constexpr, column, expert, start, rows, columns, bias_ptr, out_ptr, out_stride, target_ptr,
    GATE_UP: gl.constexpr, BIAS: gl.constexpr, LIMIT: gl.constexpr,
):  # fmt: skip
    """Finish acc, of tile rows from FIRST on."""
    N: gl.constexpr = acc.shape[1]
    PARTS: gl.constexpr = 2 if GATE_UP else 1
    if GATE_UP:
        gate, up = acc.reshape([4, 2, 8, N]).permute((0, 2, 3, 1)).split()
        gate = gate.reshape([32, N])
        up = up.reshape([32, N])
        n = column + gl.arange(0, 32, gl.SliceLayout(1, gate.type.layout))
        result = gated(gate, up, bias_ptr, expert, n, columns, True, BIAS, LIMIT)
    else:
        n = column + gl.arange(0, 64, gl.SliceLayout(1, acc.type.layout))
        result = add_bias(acc, bias_ptr + expert * columns, n, n < columns, True) if BIAS else acc
    layout: gl.constexpr = store_layout(N, PARTS)
    result = gl.convert_layout(result.to(out_ptr.dtype.element_ty).permute((1, 0)), layout)
    m = FIRST + gl.arange(0, N, gl.SliceLayout(1, layout))
    live = m < rows
    target = start + m
    if not GATE_UP:
        target = gl.load(target_ptr + target, mask=live, other=0)
    n = column + gl.arange(0, 64 // PARTS, gl.SliceLayout(0, layout))
    out_ptrs = out_ptr + gl.expand_dims(target.to(gl.int64) * out_stride, 1) + gl.expand_dims(n, 0)
    gl.store(out_ptrs, result, mask=gl.expand_dims(live, 1))


@gluon.jit
def _multiply_item(
    slot, parity, scale, up_scale, scale_ptr, next_scale_ptr, steps, to_up,
    column, expert, start, rows, columns, bias_ptr, out_ptr, out_stride, target_ptr, a, b, full, empty,
    FIRST: gl.constexpr, REST: gl.constexpr,
    CONSUMER: gl.constexpr, GATE_UP: gl.constexpr, BIAS: gl.constexpr, LIMIT: gl.constexpr,
):  # fmt: skip
    """An item whose tile has up to FIRST + REST rows, whose products are apart. scale and up_scale: of its first step.

    Returns slot and parity after it and the scales of the next item.
    """
    acc = gl.zeros((64, FIRST), gl.float32, accumulator_layout(FIRST))
    if REST:
        rest_acc = gl.zeros((64, REST), gl.float32, accumulator_layout(REST))
    for step in range(steps):
        mbarrier.wait(full.index(slot), parity)
        if GATE_UP:
            fence_async_shared()  # wgmma does not see by itself what cp.async wrote
        w0, w1 = _widened(a.index(slot), CONSUMER, GATE_UP)
        product = _start_product(w0, w1, b, slot, 0, FIRST)
        if REST:
            rest = _start_product(w0, w1, b, slot, FIRST, REST)
        next_ptr = gl.where(step + 1 < steps, scale_ptr + step + 1, next_scale_ptr)
        next_scale = gl.load(next_ptr)
        next_up_scale = gl.load(next_ptr + to_up) if GATE_UP else next_scale
        if REST:
            product, rest = warpgroup_mma_wait(0, deps=[product, rest])
        else:
            product = warpgroup_mma_wait(0, deps=[product])
        mbarrier.arrive(empty.index(slot))
        acc = _add_scaled(acc, product, scale, up_scale, GATE_UP)
        if REST:
            rest_acc = _add_scaled(rest_acc, rest, scale, up_scale, GATE_UP)
        scale = next_scale
        up_scale = next_up_scale
        slot, parity = advance(slot, parity, 1, a.shape[0])
    _store(
        acc, 0, column, expert, start, rows, columns, bias_ptr, out_ptr, out_stride, target_ptr, GATE_UP, BIAS, LIMIT
    )
    if REST:
        _store(
            rest_acc, FIRST, column, expert, start, rows, columns, bias_ptr, out_ptr, out_stride, target_ptr,
            GATE_UP, BIAS, LIMIT,
        )  # fmt: skip
    return slot, parity, scale, up_scale


@gluon.jit
def _multiply(
    CONSUMER: gl.constexpr, scale_ptr, bias_ptr, out_ptr, out_stride, target_ptr, tiles_ptr, num_tiles_ptr,
    depth, columns, a, b, full, empty,
    GATE_UP: gl.constexpr, GROUP_M: gl.constexpr, BIAS: gl.constexpr, LIMIT: gl.constexpr, OUT_AT: gl.constexpr,
):  # fmt: skip
    """Consumer 0 or 1: the first or the second half of each item's columns."""
    PARTS: gl.constexpr = 2 if GATE_UP else 1
    BLOCK_N: gl.constexpr = a.shape[1] // PARTS
    if OUT_AT:
        out_ptr = gl.multiple_of(gl.load(out_ptr).to(gl.pointer_type(gl.bfloat16)), 16)
    n_blocks = columns // BLOCK_N
    total = gl.load(num_tiles_ptr) * n_blocks
    steps = depth // 128
    to_up = columns // 128 * steps
    begin = gl.program_id(0)
    slot = 0
    parity = 0
    expert, start, rows, block_n = locate(begin, total, tiles_ptr, n_blocks, GROUP_M)
    scales = scale_ptr + (expert * PARTS * (columns // 128) + block_n * BLOCK_N // 128) * steps
    scale = gl.load(scales)
    up_scale = gl.load(scales + to_up) if GATE_UP else scale
    for index in range(begin, total, gl.num_programs(0)):
        # early, so that the next item's loads are not waited for
        next_expert, next_start, next_rows, next_block_n = locate(
            index + gl.num_programs(0), total, tiles_ptr, n_blocks, GROUP_M
        )  # fmt: skip
        next_scales = scale_ptr + (next_expert * PARTS * (columns // 128) + next_block_n * BLOCK_N // 128) * steps
        column = block_n * BLOCK_N + CONSUMER * (BLOCK_N // 2)
        if rows <= 32:
            slot, parity, scale, up_scale = _multiply_item(
                slot, parity, scale, up_scale, scales, next_scales, steps, to_up,
                column, expert, start, rows, columns, bias_ptr, out_ptr, out_stride, target_ptr, a, b, full, empty,
                32, 0, CONSUMER, GATE_UP, BIAS, LIMIT,
            )  # fmt: skip
        elif rows <= 64:
            slot, parity, scale, up_scale = _multiply_item(
                slot, parity, scale, up_scale, scales, next_scales, steps, to_up,
                column, expert, start, rows, columns, bias_ptr, out_ptr, out_stride, target_ptr, a, b, full, empty,
                64, 0, CONSUMER, GATE_UP, BIAS, LIMIT,
            )  # fmt: skip
        elif rows <= 96:
            slot, parity, scale, up_scale = _multiply_item(
                slot, parity, scale, up_scale, scales, next_scales, steps, to_up,
                column, expert, start, rows, columns, bias_ptr, out_ptr, out_stride, target_ptr, a, b, full, empty,
                64, 32, CONSUMER, GATE_UP, BIAS, LIMIT,
            )  # fmt: skip
        else:
            slot, parity, scale, up_scale = _multiply_item(
                slot, parity, scale, up_scale, scales, next_scales, steps, to_up,
                column, expert, start, rows, columns, bias_ptr, out_ptr, out_stride, target_ptr, a, b, full, empty,
                128, 0, CONSUMER, GATE_UP, BIAS, LIMIT,
            )  # fmt: skip
        expert, start, rows, block_n, scales = next_expert, next_start, next_rows, next_block_n, next_scales


@gluon.jit
def fp8_kernel(
    x, x_stride, w_desc, scale_ptr, bias_ptr, out_ptr, out_stride, index_ptr, tiles_ptr, num_tiles_ptr, depth, columns,
    GATE_UP: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
    BIAS: gl.constexpr, LIMIT: gl.constexpr, OUT_AT: gl.constexpr,
):  # fmt: skip
    """GATE_UP: act[position] = silu(x[index[position]] @ gate.T) * (x[index[position]] @ up.T), or with a LIMIT
    gpt-oss's activation; else out[index[position]] = x[position] @ w.T.

    x: with GATE_UP a pointer to the hidden states, else a descriptor of the activations. w_desc: all rows of
    `QuantizedWeight.data`, a block of gate, up or down each. depth and columns: multiples of 128.
    """
    LOAD_WARPS: gl.constexpr = 4 if GATE_UP else 1  # to gather takes more than to start a TMA
    a = gl.allocate_shared_memory(gl.int32, [STAGES, 128, 32], WORDS)
    b = gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES, BLOCK_M, HALF], SHARED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + 32 * LOAD_WARPS if GATE_UP else 1)  # TMA, and each gathering thread
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (_multiply, (0, scale_ptr, bias_ptr, out_ptr, out_stride, index_ptr, tiles_ptr, num_tiles_ptr,
                         depth, columns, a, b, full, empty, GATE_UP, GROUP_M, BIAS, LIMIT, OUT_AT)),
            (_multiply, (1, scale_ptr, bias_ptr, out_ptr, out_stride, index_ptr, tiles_ptr, num_tiles_ptr,
                         depth, columns, a, b, full, empty, GATE_UP, GROUP_M, BIAS, LIMIT, OUT_AT)),
            (_load, (x, x_stride, w_desc, index_ptr, tiles_ptr, num_tiles_ptr, depth, columns,
                     a, b, full, empty, GATE_UP, GROUP_M, LOAD_WARPS)),
        ],
        [4, LOAD_WARPS],
        [216, 56],  # registers of a thread of the second consumer and of the producer
    )  # fmt: skip


def gate_up(
    x: torch.Tensor, w13: QuantizedWeight, bias: torch.Tensor | None, limit: float, activations: torch.Tensor,
    grouping: Grouping, cut: Tiling, programs: int,
) -> None:  # fmt: skip
    """The first product of `QuantizedExperts.ffn`; bias: [experts, 2 * intermediate]."""
    if x.data_ptr() % 16 or x.stride(0) % 16:  # cp.async moves 16 bytes
        x = x.clone(memory_format=torch.contiguous_format)
    _launch(
        x, x.stride(0), w13, bias, activations, activations.stride(0), grouping.rows, grouping, cut, programs,
        GATE_UP=True, LIMIT=limit, OUT_AT=False,
    )  # fmt: skip


def down(
    activations: torch.Tensor, w2: QuantizedWeight, bias: torch.Tensor | None, out: torch.Tensor,
    grouping: Grouping, cut: Tiling, programs: int,
) -> None:  # fmt: skip
    """The second one; bias: [experts, hidden]."""
    x = TensorDescriptor.from_tensor(activations, [BOX.value, HALF.value], SHARED.value)
    out_at = out.dtype == torch.int64
    _launch(
        x, 0, w2, bias, out, w2.shape[1] if out_at else out.stride(0), grouping.order, grouping, cut, programs,
        GATE_UP=False, LIMIT=0.0, OUT_AT=out_at,
    )  # fmt: skip


def _launch(
    x: Any, x_stride: int, w: QuantizedWeight, bias: torch.Tensor | None, out: torch.Tensor, out_stride: int,
    index: torch.Tensor, grouping: Grouping, cut: Tiling, programs: int, *, GATE_UP: bool, **chosen: Any,
) -> None:  # fmt: skip
    columns, depth = w.shape[1] // (2 if GATE_UP else 1), w.shape[2]
    w_desc = TensorDescriptor.from_tensor(w.data.view(-1, w.data.shape[3]), [cut.block_n, 32], WORDS.value)
    items = grouping.max_tiles * (columns // cut.block_n)
    fp8_kernel[(min(items, programs),)](
        x, x_stride, w_desc, w.scale, w.scale if bias is None else bias, out, out_stride, index,
        grouping.tiles, grouping.num_tiles, depth, columns,
        GATE_UP=GATE_UP, STAGES=cut.stages, GROUP_M=cut.group_m, BIAS=bias is not None, num_warps=4, **chosen,
    )  # fmt: skip
