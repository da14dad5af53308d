"""The two grouped GEMMs on quantised weights for many rows per expert, warp-specialised: in Gluon, for Hopper.

A program has the multiprocessor to itself and strides over work items, a tile of up to 128 rows by a block of weight
rows each (of gate and as many of up, or of down):

* one group of warps loads: step after step of 128 of K, item after item, into a ring of slots in shared memory;
* two groups multiply, each half of the weight rows. A thread widens the words of its own rows from shared memory to
  bf16 registers, the left operand, so that each weight is widened once for up to 128 rows. While one group widens, the
  other one's products keep the tensor cores busy.

A tile takes the time of the next of a few heights (`heights`): there is a loop for each. Barriers: see
`gluon_grouped_gemm`.

The bits are those of `triton_quantized_gemm`. fp8: each 128 of K has an accumulator of its own, 16 at a time upwards,
which one fused multiply-add per element scales and adds. MXFP4: one accumulator runs over K. The functions after it are
the same.

A group has two blocks of 64 weight rows, so that rows are loaded half as often as for one, or in a narrow down one.
MXFP4's second block is widened under the products of the first; fp8's follows it, for the registers.
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

from kernels.gluon_grouped_gemm import SHARED, advance, aligned, locate
from kernels.quantized_weight import QuantizedWeight
from kernels.triton_activation import add_bias, gated
from kernels.triton_grouping import Grouping
from kernels.triton_tiling import Tiling
from kernels.triton_widen import widen_fp8, widen_mxfp4

WORDS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32))
"""Of the weights, 32 words in a row: one of fp8, two of MXFP4."""
SCALES = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
"""Of MXFP4's."""
BOX = gl.constexpr(32)
"""Rows that one TMA loads."""
HALF = gl.constexpr(64)
"""Of a step's 128 of K: what swizzled rows of 128 bytes hold."""


def admits(w13: QuantizedWeight, w2: QuantizedWeight) -> bool:
    """Whether the kernel can multiply by such weights: compiled, on Hopper, in whole blocks and steps."""
    (_, double, depth), (_, hidden, intermediate) = w13.shape, w2.shape
    return (
        w13.data.is_cuda
        and not triton.knobs.runtime.interpret
        and torch.cuda.get_device_capability(w13.data.device) == (9, 0)
        and (depth, 2 * intermediate) == (hidden, double)  # MXFP4 may be stored deeper than rows are long
        and hidden % (256 if w13.mxfp4 else 128) == 0
    )


@gluon.constexpr_function
def heights(mxfp4, blocks, block_m):
    """For how many rows there are loops: two numbers, whose products are apart, since Triton's sizes are powers of two.

    The second one may be 0. blocks: of 64 weight rows, of a consumer.
    """
    every = (16, 0), (32, 0), (32, 16), (64, 0), (64, 16), (64, 32), (128, 0)
    left_out = [] if mxfp4 else [16, 48] if blocks == 2 else [16, 48, 80]
    return tuple(height for height in every if sum(height) <= block_m and sum(height) not in left_out)


@gluon.constexpr_function
def registers(blocks, gate_up, mxfp4):
    """Of a thread of the second consumer and of the producer; the first consumer gets what is left."""
    if blocks == 1:
        return [216, 56]
    if not gate_up:
        return [240, 24]
    return [224, 56] if mxfp4 else [232, 40]


@gluon.constexpr_function
def accumulator_layout(n):
    """Of 64 weight rows by n tile rows."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, n, 16])


@gluon.constexpr_function
def words_layout(mxfp4, parts):
    """Of the words of 64 / parts weight rows as they lie in shared memory, see `WORDS`.

    A thread has what it feeds to the tensor cores.
    """
    if mxfp4:
        words, lanes = [[0, 1], [0, 2]], [[0, 4], [0, 8], [0, 16], [1, 0], [2, 0]]
        rows = [[4, 0], [8, 0], [16, 0]]
    else:
        words, lanes = [[0, 1], [0, 2], [0, 4]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
        rows = [[8, 0], [16, 0], [32, 0]]
    height = (32 if mxfp4 else 64) // parts
    own, warps = (rows[:1], rows[1:]) if parts == 1 else ([], rows[:2])
    return gl.DistributedLinearLayout([*own, *words], lanes, warps, [], [height, 32])


@gluon.constexpr_function
def scales_layout(parts):
    """Of the scales of 64 / parts weight rows, for each of the four threads that have words of a row.

    So `widen_mxfp4` finds the words that they belong to, those of [rows, 1, thread, 2, 2].
    """
    rows = [[8, 0, 0, 0, 0], [16, 0, 0, 0, 0], [32, 0, 0, 0, 0]]
    own, warps = (rows[:1], rows[1:]) if parts == 1 else ([], rows[:2])
    words, threads = [[0, 0, 0, 1, 0], [0, 0, 0, 0, 1]], [[0, 0, 1, 0, 0], [0, 0, 2, 0, 0]]
    lanes = [*threads, [1, 0, 0, 0, 0], [2, 0, 0, 0, 0], [4, 0, 0, 0, 0]]
    layout = gl.DistributedLinearLayout([*own, *words], lanes, warps, [], [64 // parts, 1, 4, 2, 2])
    return gl.SliceLayout(3, gl.SliceLayout(4, layout))


@gluon.constexpr_function
def store_layout(n, parts):
    """Of n tile rows by 64 / parts columns: a warp keeps the columns that it multiplied, a thread stores 16 bytes."""
    rows = [[1, 0], [2, 0], [4, 0], [8, 0], [16, 0], [32, 0], [64, 0]][: n.bit_length() - 1]
    own, columns = [[0, 1], [0, 2], [0, 4]], [[0, 8], [0, 16], [0, 32]]
    if parts == 2:
        lanes = [*rows, [0, 0]][:5]  # of 16 rows, half of the threads have copies
        return gl.DistributedLinearLayout([*own, *rows[5:]], lanes, columns[:2], [], [n, 32])
    return gl.DistributedLinearLayout([*own, *rows[4:]], [columns[0], *rows[:4]], columns[1:], [], [n, 64])


@gluon.jit
def _load_weights(
    w_desc, scale_ptr, w_row, columns, words, scales, bar, boxes,
    MXFP4: gl.constexpr, PARTS: gl.constexpr, BOXES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Of a step, into a slot, whose barrier is to expect `boxes` of up to BOXES boxes of rows too."""
    BOX_N: gl.constexpr = words.shape[0] // PARTS
    PACKED: gl.constexpr = 2 if MXFP4 else 1  # weight rows in a row of words
    BLOCK_N: gl.constexpr = PACKED * BOX_N
    n = gl.arange(0, BLOCK_N, gl.BlockedLayout([4], [32], [WARPS], [0]))  # 16 bytes of a thread
    if BOXES == 0:
        mbarrier.expect(bar, PARTS * BOX_N * 128)
    for box in gl.static_range(BOXES):
        mbarrier.expect(bar, PARTS * BOX_N * 128 + (box + 1) * BOX * 256, pred=boxes == box + 1)
    for part in gl.static_range(PARTS):
        row = w_row + part * columns
        if MXFP4:
            async_copy.async_copy_global_to_shared(scales.slice(part * BLOCK_N, BLOCK_N), scale_ptr + row + n)
        tma.async_copy_global_to_shared(w_desc, [row // PACKED, 0], bar, words.slice(part * BOX_N, BOX_N))


@gluon.jit
def _load(
    x, x_stride, w_desc, scale_ptr, rows_ptr, tiles_ptr, num_tiles_ptr, depth, columns, a, scales, b, full, empty,
    MXFP4: gl.constexpr, GATE_UP: gl.constexpr, GROUP_M: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The producer."""
    STAGES: gl.constexpr = a.shape[0]
    BLOCK_M: gl.constexpr = b.shape[1]
    PARTS: gl.constexpr = 2 if GATE_UP else 1
    BLOCK_N: gl.constexpr = a.shape[1] * (2 if MXFP4 else 1) // PARTS
    UPPER: gl.constexpr = min(BLOCK_M, 64)
    n_blocks = columns // BLOCK_N
    total = gl.load(num_tiles_ptr) * n_blocks
    steps = depth // 128
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])  # 16 bytes of a thread
    m = gl.arange(0, UPPER, gl.SliceLayout(1, layout))
    k = gl.arange(0, HALF, gl.SliceLayout(0, layout))
    slot = 0
    parity = 1
    for index in range(gl.program_id(0), total, gl.num_programs(0)):
        expert, start, rows, block_n = locate(index, total, tiles_ptr, n_blocks, GROUP_M)
        w_row = expert * steps * PARTS * columns + block_n * BLOCK_N
        boxes = gl.cdiv(rows, BOX)
        if GATE_UP:
            upper = gl.load(rows_ptr + start + m, mask=m < rows, other=0)
            upper_ptrs = x + gl.expand_dims(upper.to(gl.int64) * x_stride, 1) + gl.expand_dims(k, 0)
            upper_live = gl.expand_dims(m < rows, 1)
            if BLOCK_M > UPPER:
                lower = gl.load(rows_ptr + start + m + UPPER, mask=m + UPPER < rows, other=0)
                lower_ptrs = x + gl.expand_dims(lower.to(gl.int64) * x_stride, 1) + gl.expand_dims(k, 0)
                lower_live = gl.expand_dims(m + UPPER < rows, 1)
        for step in range(steps):
            mbarrier.wait(empty.index(slot), parity)
            bar = full.index(slot)
            _load_weights(
                w_desc, scale_ptr, w_row, columns, a.index(slot), scales.index(slot), bar, boxes,
                MXFP4, PARTS, 0 if GATE_UP else BLOCK_M // BOX, WARPS,
            )  # fmt: skip
            if GATE_UP:
                for half in gl.static_range(2):
                    k0 = step * 128 + half * HALF
                    to = b.index(2 * slot + half)
                    async_copy.async_copy_global_to_shared(to.slice(0, UPPER), upper_ptrs + k0, mask=upper_live)
                    if BLOCK_M > UPPER and rows > UPPER:
                        async_copy.async_copy_global_to_shared(
                            to.slice(UPPER, UPPER), lower_ptrs + k0, mask=lower_live
                        )  # fmt: skip
            else:  # rows past the tile belong to others: they are read, and their products not stored
                for box in gl.static_range(BLOCK_M // BOX):
                    for half in gl.static_range(2):
                        tma.async_copy_global_to_shared(
                            x, [start + box * BOX, step * 128 + half * HALF], bar,
                            b.index(2 * slot + half).slice(box * BOX, BOX), pred=box < boxes,
                        )  # fmt: skip
            if GATE_UP or MXFP4:
                async_copy.mbarrier_arrive(bar, increment_count=False)
            w_row += PARTS * columns
            slot, parity = advance(slot, parity, 1, STAGES)


@gluon.jit
def _words(words, BLOCK: gl.constexpr, MXFP4: gl.constexpr, GATE_UP: gl.constexpr):
    """Of a slot, those of a block of 64 weight rows.

    Of gate and up 8 rows of each lie in turn, so that a thread has both of a column.
    """
    OF_ROW: gl.constexpr = 16 if MXFP4 else 32
    if GATE_UP:
        layout: gl.constexpr = words_layout(MXFP4, 2)
        gate = words.slice(BLOCK * OF_ROW, OF_ROW).load(layout)
        up = words.slice(words.shape[0] // 2 + BLOCK * OF_ROW, OF_ROW).load(layout)
        both = gl.join(gate.reshape([32, OF_ROW]), up.reshape([32, OF_ROW]))
        return both.reshape([4, 8, OF_ROW, 2]).permute((0, 3, 1, 2)).reshape([64, OF_ROW])
    else:
        return words.slice(BLOCK * 2 * OF_ROW, 2 * OF_ROW).load(words_layout(MXFP4, 1)).reshape([64, OF_ROW])


@gluon.jit
def _scales(scales, BLOCK: gl.constexpr, GATE_UP: gl.constexpr):
    """The same of MXFP4's scales, for each thread that has words of a row: [64, 1, 4]."""
    layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, scales_layout(1)))
    if GATE_UP:
        of_part: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, scales_layout(2)))
        gate = scales.slice(BLOCK * 32, 32).load(of_part)
        up = scales.slice(scales.shape[0] // 2 + BLOCK * 32, 32).load(of_part)
        own = gl.convert_layout(gl.join(gate, up).reshape([4, 8, 2]).permute((0, 2, 1)).reshape([64]), layout)
    else:
        own = scales.slice(BLOCK * 64, 64).load(layout)
    return gl.expand_dims(gl.expand_dims(own, 1), 2).broadcast_to([64, 1, 4])


@gluon.jit
def _widened(words, scales, BLOCK: gl.constexpr, MXFP4: gl.constexpr, GATE_UP: gl.constexpr):
    """64 weight rows of a slot, both halves of K."""
    own = _words(words, BLOCK, MXFP4, GATE_UP)
    if MXFP4:
        wide = widen_mxfp4(own.reshape([64, 1, 16]), _scales(scales, BLOCK, GATE_UP), 1, True)
    else:
        wide = widen_fp8(own, True)
    return wide.reshape([64, 2, HALF]).permute((0, 2, 1)).split()


@gluon.jit
def _start_product(w0, w1, b, slot, acc, FIRST: gl.constexpr, USE_ACC: gl.constexpr):
    """Start the product of one step with the rows of the tile from FIRST on, onto acc if USE_ACC."""
    N: gl.constexpr = acc.shape[1]
    operand: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    x = b.index(2 * slot).slice(FIRST, N).permute((1, 0))
    acc = warpgroup_mma(gl.convert_layout(w0, operand), x, acc, use_acc=USE_ACC, is_async=True)
    x = b.index(2 * slot + 1).slice(FIRST, N).permute((1, 0))
    return warpgroup_mma(gl.convert_layout(w1, operand), x, acc, is_async=True)


@gluon.jit
def _zeros(N: gl.constexpr):
    return gl.zeros((64, N), gl.float32, accumulator_layout(N))


@gluon.jit
def _add_scaled(acc, product, scale, up_scale, GATE_UP: gl.constexpr):
    if GATE_UP:
        row = gl.arange(0, 64, gl.SliceLayout(1, acc.type.layout))
        scale = gl.expand_dims(gl.where((row & 8) == 0, scale, up_scale), 1).broadcast_to(acc.shape)
    else:
        scale = gl.full(acc.shape, scale, gl.float32, acc.type.layout)
    return gl.fma(product, scale, acc)


@gluon.jit
def _targets(start, rows, target_ptr, FIRST: gl.constexpr, N: gl.constexpr, GATE_UP: gl.constexpr):
    """Where results of N tile rows from FIRST on go."""
    m = FIRST + gl.arange(0, N, gl.SliceLayout(1, store_layout(N, 2 if GATE_UP else 1)))
    target = start + m
    if not GATE_UP:
        target = gl.load(target_ptr + target, mask=m < rows, other=0)
    return target


@gluon.jit
def _store(
    acc, FIRST: gl.constexpr, column, expert, target, rows, columns, bias_ptr, out_ptr, out_stride,
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
    n = column + gl.arange(0, 64 // PARTS, gl.SliceLayout(0, layout))
    out_ptrs = out_ptr + gl.expand_dims(target.to(gl.int64) * out_stride, 1) + gl.expand_dims(n, 0)
    gl.store(out_ptrs, result, mask=gl.expand_dims(m < rows, 1))


@gluon.jit
def _start_fp8_block(
    words, b, slot, BLOCK: gl.constexpr, FIRST: gl.constexpr, REST: gl.constexpr, GATE_UP: gl.constexpr
):  # fmt: skip
    """Widen 64 weight rows of a slot, fp8, and start their products with the tile's first rows, and with the REST."""
    w0, w1 = _widened(words, words, BLOCK, False, GATE_UP)
    product = _start_product(w0, w1, b, slot, _zeros(FIRST), 0, False)
    rest = _zeros(REST if REST else 16)
    if REST:
        rest = _start_product(w0, w1, b, slot, rest, FIRST, False)
    return product, rest


@gluon.jit
def _add_block(acc, rest_acc, product, rest, scale, up_scale, REST: gl.constexpr, GATE_UP: gl.constexpr):
    acc = _add_scaled(acc, product, scale, up_scale, GATE_UP)
    if REST:
        rest_acc = _add_scaled(rest_acc, rest, scale, up_scale, GATE_UP)
    return acc, rest_acc


@gluon.jit
def _fp8_item(
    slot, parity, scale, up_scale, scale_ptr, next_scale_ptr, to_up, steps,
    column, expert, start, rows, columns, bias_ptr, out_ptr, out_stride, target_ptr, a, b, full, empty,
    FIRST: gl.constexpr, REST: gl.constexpr, BLOCKS: gl.constexpr,
    CONSUMER: gl.constexpr, GATE_UP: gl.constexpr, BIAS: gl.constexpr, LIMIT: gl.constexpr,
):  # fmt: skip
    """An item whose tile has up to FIRST + REST rows, of one or two BLOCKS of weight rows, one after the other.

    scale and up_scale: of its first step. Returns slot and parity after it and the scales of the next item.
    """
    SOME: gl.constexpr = REST if REST else 16  # without a REST, what has that size is not used
    WIDTH: gl.constexpr = 32 if GATE_UP else 64
    acc = _zeros(FIRST)
    rest_acc = _zeros(SOME)
    second = _zeros(FIRST)
    second_rest = _zeros(SOME)
    for step in range(steps):
        mbarrier.wait(full.index(slot), parity)
        if GATE_UP:
            fence_async_shared()  # wgmma does not see by itself what cp.async wrote
        for block in gl.static_range(BLOCKS):
            product, rest = _start_fp8_block(a.index(slot), b, slot, BLOCKS * CONSUMER + block, FIRST, REST, GATE_UP)
            if block == 0:
                next_ptr = gl.where(step + 1 < steps, scale_ptr + step + 1, next_scale_ptr)
                next_scale = gl.load(next_ptr)
                next_up_scale = gl.load(next_ptr + to_up) if GATE_UP else next_scale
            if REST:
                product, rest = warpgroup_mma_wait(0, deps=[product, rest])
            else:
                product = warpgroup_mma_wait(0, deps=[product])
            if block == BLOCKS - 1:
                mbarrier.arrive(empty.index(slot))
            if block == 0:
                acc, rest_acc = _add_block(acc, rest_acc, product, rest, scale, up_scale, REST, GATE_UP)
            else:
                second, second_rest = _add_block(second, second_rest, product, rest, scale, up_scale, REST, GATE_UP)
        scale = next_scale
        up_scale = next_up_scale
        slot, parity = advance(slot, parity, 1, a.shape[0])
    for block in gl.static_range(BLOCKS):
        target = _targets(start, rows, target_ptr, 0, FIRST, GATE_UP)
        _store(
            second if block else acc, 0, column + block * WIDTH, expert, target, rows, columns,
            bias_ptr, out_ptr, out_stride, GATE_UP, BIAS, LIMIT,
        )  # fmt: skip
        if REST:
            target = _targets(start, rows, target_ptr, FIRST, REST, GATE_UP)
            _store(
                second_rest if block else rest_acc, FIRST, column + block * WIDTH, expert, target, rows, columns,
                bias_ptr, out_ptr, out_stride, GATE_UP, BIAS, LIMIT,
            )  # fmt: skip
    return slot, parity, scale, up_scale


@gluon.jit
def _start_block(
    words, scales, b, slot, acc, rest, BLOCK: gl.constexpr, FIRST: gl.constexpr, REST: gl.constexpr,
    GATE_UP: gl.constexpr,
):  # fmt: skip
    """Widen 64 weight rows of a slot, MXFP4, and start their products with the tile's first rows, and with the REST."""
    w0, w1 = _widened(words, scales, BLOCK, True, GATE_UP)
    acc = _start_product(w0, w1, b, slot, acc, 0, True)
    if REST:
        rest = _start_product(w0, w1, b, slot, rest, FIRST, True)
    return acc, rest


@gluon.jit
def _mxfp4_item(
    slot, parity, steps, column, expert, start, rows, columns, bias_ptr, out_ptr, out_stride, target_ptr,
    a, scales, b, full, empty, FIRST: gl.constexpr, REST: gl.constexpr, BLOCKS: gl.constexpr,
    CONSUMER: gl.constexpr, GATE_UP: gl.constexpr, BIAS: gl.constexpr, LIMIT: gl.constexpr,
):  # fmt: skip
    """An item whose tile has up to FIRST + REST rows, of one or two BLOCKS of weight rows.

    Returns slot and parity after it.
    """
    SOME: gl.constexpr = REST if REST else 16  # without a REST, what has that size is not used
    WIDTH: gl.constexpr = 32 if GATE_UP else 64
    FIRST_BLOCK: gl.constexpr = BLOCKS * CONSUMER
    acc = _zeros(FIRST)
    rest = _zeros(SOME)
    second = _zeros(FIRST)
    second_rest = _zeros(SOME)
    target = _targets(start, rows, target_ptr, 0, FIRST, GATE_UP)  # early: it is not waited for
    rest_target = _targets(start, rows, target_ptr, FIRST, SOME, GATE_UP)
    for _ in range(steps):
        mbarrier.wait(full.index(slot), parity)
        if GATE_UP:
            fence_async_shared()
        words = a.index(slot)
        of_slot = scales.index(slot)
        acc, rest = _start_block(words, of_slot, b, slot, acc, rest, FIRST_BLOCK, FIRST, REST, GATE_UP)
        if BLOCKS == 2:
            second, second_rest = _start_block(
                words, of_slot, b, slot, second, second_rest, FIRST_BLOCK + 1, FIRST, REST, GATE_UP
            )
            if REST:
                acc, rest, second, second_rest = warpgroup_mma_wait(0, deps=[acc, rest, second, second_rest])
            else:
                acc, second = warpgroup_mma_wait(0, deps=[acc, second])
        elif REST:
            acc, rest = warpgroup_mma_wait(0, deps=[acc, rest])
        else:
            acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(slot))
        slot, parity = advance(slot, parity, 1, a.shape[0])
    for block in gl.static_range(BLOCKS):
        _store(
            (second if block else acc) * 65536.0, 0, column + block * WIDTH, expert, target, rows, columns,
            bias_ptr, out_ptr, out_stride, GATE_UP, BIAS, LIMIT,
        )  # fmt: skip
        if REST:
            _store(
                (second_rest if block else rest) * 65536.0, FIRST, column + block * WIDTH, expert, rest_target, rows,
                columns, bias_ptr, out_ptr, out_stride, GATE_UP, BIAS, LIMIT,
            )  # fmt: skip
    return slot, parity


@gluon.jit
def _multiply(
    CONSUMER: gl.constexpr, scale_ptr, bias_ptr, out_ptr, out_stride, target_ptr, tiles_ptr, num_tiles_ptr,
    depth, columns, a, scales, b, full, empty, MXFP4: gl.constexpr, BLOCK_N: gl.constexpr,
    GATE_UP: gl.constexpr, GROUP_M: gl.constexpr, BIAS: gl.constexpr, LIMIT: gl.constexpr, OUT_AT: gl.constexpr,
):  # fmt: skip
    """Consumer 0 or 1: the first or the second half of each item's columns."""
    PARTS: gl.constexpr = 2 if GATE_UP else 1
    BLOCKS: gl.constexpr = PARTS * BLOCK_N // 128
    HEIGHTS: gl.constexpr = heights(MXFP4, BLOCKS, b.shape[1])
    if OUT_AT:
        out_ptr = gl.multiple_of(gl.load(out_ptr).to(gl.pointer_type(gl.bfloat16)), 16)
    n_blocks = columns // BLOCK_N
    total = gl.load(num_tiles_ptr) * n_blocks
    steps = depth // 128
    begin = gl.program_id(0)
    slot = 0
    parity = 0
    expert, start, rows, block_n = locate(begin, total, tiles_ptr, n_blocks, GROUP_M)
    column = block_n * BLOCK_N + CONSUMER * (BLOCK_N // 2)
    if not MXFP4:
        to_up = columns // 128 * steps
        of_item = scale_ptr + (expert * PARTS * (columns // 128) + column // 128) * steps
        scale = gl.load(of_item)
        up_scale = gl.load(of_item + to_up) if GATE_UP else scale
    for index in range(begin, total, gl.num_programs(0)):
        # early, so that the next item's loads are not waited for
        next_expert, next_start, next_rows, next_block_n = locate(
            index + gl.num_programs(0), total, tiles_ptr, n_blocks, GROUP_M
        )  # fmt: skip
        next_column = next_block_n * BLOCK_N + CONSUMER * (BLOCK_N // 2)
        if not MXFP4:
            of_next = scale_ptr + (next_expert * PARTS * (columns // 128) + next_column // 128) * steps
        lower = 0
        for height in gl.static_range(len(HEIGHTS)):
            if (rows > lower) & (rows <= HEIGHTS[height][0] + HEIGHTS[height][1]):
                if MXFP4:
                    slot, parity = _mxfp4_item(
                        slot, parity, steps, column, expert, start, rows, columns,
                        bias_ptr, out_ptr, out_stride, target_ptr, a, scales, b, full, empty,
                        HEIGHTS[height][0], HEIGHTS[height][1], BLOCKS, CONSUMER, GATE_UP, BIAS, LIMIT,
                    )  # fmt: skip
                else:
                    slot, parity, scale, up_scale = _fp8_item(
                        slot, parity, scale, up_scale, of_item, of_next, to_up, steps, column, expert, start, rows,
                        columns, bias_ptr, out_ptr, out_stride, target_ptr, a, b, full, empty,
                        HEIGHTS[height][0], HEIGHTS[height][1], BLOCKS, CONSUMER, GATE_UP, BIAS, LIMIT,
                    )  # fmt: skip
            lower = HEIGHTS[height][0] + HEIGHTS[height][1]
        expert, start, rows, column = next_expert, next_start, next_rows, next_column
        if not MXFP4:
            of_item = of_next


@gluon.jit
def quantized_kernel(
    x, x_stride, w_desc, scale_ptr, bias_ptr, out_ptr, out_stride, index_ptr, tiles_ptr, num_tiles_ptr, depth, columns,
    MXFP4: gl.constexpr, GATE_UP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, GROUP_M: gl.constexpr, BIAS: gl.constexpr, LIMIT: gl.constexpr, OUT_AT: gl.constexpr,
):  # fmt: skip
    """GATE_UP: act[position] = silu(x[index[position]] @ gate.T) * (x[index[position]] @ up.T), or with a LIMIT
    gpt-oss's activation; else out[index[position]] = x[position] @ w.T.

    x: with GATE_UP a pointer to the hidden states, else a descriptor of the activations. w_desc: all of
    `QuantizedWeight.data`, a block of gate, up or down each. depth and columns: multiples of 128 and of BLOCK_N.
    """
    LOAD_WARPS: gl.constexpr = 4 if GATE_UP else 1  # to gather takes more than to start a TMA
    ROWS: gl.constexpr = 2 * BLOCK_N if GATE_UP else BLOCK_N
    REGISTERS: gl.constexpr = registers(ROWS // 128, GATE_UP, MXFP4)
    a = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS // 2 if MXFP4 else ROWS, 32], WORDS)
    if MXFP4:
        scales = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS], SCALES)
    else:
        scales = a  # not used
    b = gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES, BLOCK_M, HALF], SHARED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        # TMA, and each thread that copies itself
        mbarrier.init(full.index(i), count=1 + 32 * LOAD_WARPS if GATE_UP or MXFP4 else 1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (_multiply, (0, scale_ptr, bias_ptr, out_ptr, out_stride, index_ptr, tiles_ptr, num_tiles_ptr, depth,
                         columns, a, scales, b, full, empty, MXFP4, BLOCK_N, GATE_UP, GROUP_M, BIAS, LIMIT, OUT_AT)),
            (_multiply, (1, scale_ptr, bias_ptr, out_ptr, out_stride, index_ptr, tiles_ptr, num_tiles_ptr, depth,
                         columns, a, scales, b, full, empty, MXFP4, BLOCK_N, GATE_UP, GROUP_M, BIAS, LIMIT, OUT_AT)),
            (_load, (x, x_stride, w_desc, scale_ptr, index_ptr, tiles_ptr, num_tiles_ptr, depth, columns,
                     a, scales, b, full, empty, MXFP4, GATE_UP, GROUP_M, LOAD_WARPS)),
        ],
        [4, LOAD_WARPS],
        REGISTERS,
    )  # fmt: skip


def gate_up(
    x: torch.Tensor, w13: QuantizedWeight, bias: torch.Tensor | None, limit: float, activations: torch.Tensor,
    grouping: Grouping, cut: Tiling, programs: int,
) -> None:  # fmt: skip
    """The first product of `QuantizedExperts.ffn`; bias: [experts, 2 * intermediate]."""
    x = aligned(x)
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
    box = [cut.block_n * w.data.shape[3] // 32, 32]
    items = grouping.max_tiles * (columns // cut.block_n)
    quantized_kernel[(min(items, programs),)](
        x, x_stride, TensorDescriptor.from_tensor(w.data.view(-1, 32), box, WORDS.value), w.scale,
        w.scale if bias is None else bias, out, out_stride, index, grouping.tiles, grouping.num_tiles, depth, columns,
        MXFP4=w.mxfp4, GATE_UP=GATE_UP, BLOCK_M=grouping.block_m, BLOCK_N=cut.block_n, STAGES=cut.stages,
        GROUP_M=cut.group_m, BIAS=bias is not None, num_warps=4, **chosen,
    )  # fmt: skip
