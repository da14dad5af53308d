"""The expert FFN on MXFP4 weights in tiles of few rows, warp-specialised: in Gluon, for Hopper.

A program takes one item after another: a tile by a block of weight rows, half of gate and half of up, or of down.

* One warp claims items and loads, step after step, into a ring of slots in shared memory: weights by TMA, scales and
  token rows by cp.async. With an item's first slot it tells the others which item that is.
* Four warps multiply, each its own weight rows: a thread widens the words that it feeds to the tensor cores.

Weights are the left operand, tokens the width, 8 of an mma: there is a loop for each multiple of 8, so that a tile
takes the time of its rows. It is mma and not wgmma, which takes as long for 8 tokens as for 16, and holds registers of
the weights until it ends.

Items are claimed in order, those of gate/up before those of down. So when a program waits for a tile's gate/up, as in
`triton_handover`, others have claimed all of it, which wait for nobody.

Products and hand-over are those of `triton_small_tiles`, and so are the bits: one accumulator that runs over K upwards,
16 at a time.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.gluon_grouped_gemm import SHARED, advance, aligned
from kernels.quantized_weight import COLUMNS, QuantizedWeight
from kernels.triton_activation import add_bias, gated
from kernels.triton_grouping import COUNTER_FIELD, TILE_FIELDS, Grouping
from kernels.triton_handover import leave
from kernels.triton_tiling import RingTiling
from kernels.triton_widen import widen_mxfp4_half

SLOT = gl.constexpr(128)
"""Weight rows of a slot, of 128 columns each: an item of 64 rows takes two such runs of columns in a step, one of 128
one."""
STEP = 2 * COLUMNS
"""Columns of the deepest step."""
HALF = gl.constexpr(64)
"""Of a run's columns: what swizzled token rows of 128 bytes hold."""
HEIGHT = gl.constexpr(8)
"""Token rows of an mma."""
CLAIM = gl.constexpr(3)
"""So many steps before its end an item's successor is claimed: early enough not to be waited for, late enough not to be
kept from programs that have nothing to do."""
WORDS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=32))
"""Of the weights, 16 words in a row."""
NUMBERS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
PRODUCT = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8]))
"""Of 64 weight rows by 8 token rows."""
WORDS_OF_THREAD = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0]], [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 16]
    )
)
"""Of 64 weight rows by 16 words: a thread has the words that it feeds to the tensor cores."""
WORDS_OF_PART = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2]], [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], [[8, 0], [16, 0]], [], [32, 16]
    )
)
"""The same of 32 weight rows of gate or of up, of which 8 of each lie in turn in an operand of 64."""
STORED = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2]], [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], [[0, 16], [0, 32]], [], [8, 64]
    )
)
"""Of 8 token rows by 64 columns: a warp keeps the columns that it multiplied."""
STORED_PART = gl.constexpr(
    gl.DistributedLinearLayout([[0, 1]], [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], [[0, 8], [0, 16]], [], [8, 32])
)
"""By 32 columns."""


def admits(w13: QuantizedWeight, w2: QuantizedWeight) -> bool:
    """Whether the kernel can multiply by such weights: MXFP4, both depths whole steps, compiled, on Hopper."""
    return (
        w13.mxfp4
        and (w13.shape[2], w2.shape[2]) == (w2.shape[1], w13.shape[1] // 2)  # nothing filled up
        and w13.shape[2] % STEP == 0
        and w2.shape[2] % STEP == 0
        and w13.data.is_cuda
        and not triton.knobs.runtime.interpret
        and torch.cuda.get_device_capability(w13.data.device) == (9, 0)
    )


@gluon.jit
def _append(items, item):
    return items + (item,)  # noqa: RUF005 - Gluon knows this alone


@gluon.jit
def _claim(claims_ptr):
    """How many items were claimed before, for lane 0; it is not waited for."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .b32 lane;
        mov.b32 $0, 0;
        mov.u32 lane, %laneid;
        setp.eq.u32 p, lane, 0;
        @p atom.relaxed.gpu.global.add.u32 $0, [$1], 1;
        }""",
        "=&r,l", [claims_ptr.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _claimed(claim):
    """What lane 0 got."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", "=r,r", [claim], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _finish(claims_ptr, last):
    """The last program to come here sets both counters to 0, for the next launch."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .b32 lane, before;
        mov.b32 $0, 0;
        mov.b32 before, -1;
        mov.u32 lane, %laneid;
        setp.eq.u32 p, lane, 0;
        @p atom.acq_rel.gpu.global.inc.u32 before, [$1+4], $2;
        setp.eq.u32 p, before, $2;
        @p st.global.b32 [$1], 0;
        }""",
        "=r,l,r", [claims_ptr.to(gl.int64), last], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _sleep(ns):
    gl.inline_asm_elementwise(
        "nanosleep.u32 $1; mov.b32 $0, 0;", "=r,r", [ns], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def _count(counter_ptr):
    return gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.s32 $0, [$1];",
        "=r,l", [counter_ptr.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _await(counter_ptr, wanted):
    """Until the counter is at `wanted`; returns 0."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .b32 count;
        AGAIN: ld.acquire.gpu.global.s32 count, [$1];
        setp.lt.s32 p, count, $2;
        @p bra AGAIN;
        mov.b32 $0, 0;
        }""",
        "=r,l,r", [counter_ptr.to(gl.int64), wanted], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _entry(item, items, up_items, tiles_ptr, UP_BLOCKS: gl.constexpr, DOWN_BLOCKS: gl.constexpr):
    """A tile of an item's expert, and of its entry: the expert, first position, first tile, tile count and end."""
    item = gl.where(item < items, item, 0)  # for one that does not exist something is to be read too
    tile = gl.where(item < up_items, item // UP_BLOCKS, (item - up_items) // DOWN_BLOCKS)
    entry = tiles_ptr + TILE_FIELDS * tile
    return tile, gl.load(entry), gl.load(entry + 1), gl.load(entry + 3), gl.load(entry + 4), gl.load(entry + 5)


@gluon.jit
def _locate(item, tile, start, first, tiles, end, BLOCKS: gl.constexpr, BLOCK_M: gl.constexpr, GROUP_M: gl.constexpr):
    """The own tile of an item of one product, its first position and rows, and its block; see `triton_grouped_gemm`."""
    block = item - first * BLOCKS
    if tiles > 1:
        begin = (block // (GROUP_M * BLOCKS)) * GROUP_M
        height = gl.minimum(tiles - begin, GROUP_M)
        rest = block - begin * BLOCKS
        own = first + begin + rest % height
        start += (own - tile) * BLOCK_M
        tile = own
        block = rest // height
    return tile, start, gl.minimum(end - start, BLOCK_M), block


@gluon.jit
def _tell(told, slot, rows, tile, expert, start, block):
    """Say with an item's first slot what item it is: rows is negative of down, 0 after the last item."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    told.index(5 * slot).store(gl.full((1,), rows, gl.int32, layout))
    told.index(5 * slot + 1).store(gl.full((1,), tile, gl.int32, layout))
    told.index(5 * slot + 2).store(gl.full((1,), expert, gl.int32, layout))
    told.index(5 * slot + 3).store(gl.full((1,), start, gl.int32, layout))
    told.index(5 * slot + 4).store(gl.full((1,), block, gl.int32, layout))


@gluon.jit
def _hear(told, slot, FIELD: gl.constexpr):
    return gl.sum(told.index(5 * slot + FIELD).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _load_weights(w_desc, w_row, bar, words, BLOCK: gl.constexpr, PARTS: gl.constexpr, PART: gl.constexpr):
    OWN: gl.constexpr = BLOCK // PARTS
    mbarrier.expect(bar, SLOT * 64)
    for i in gl.static_range(SLOT // OWN):
        tma.async_copy_global_to_shared(w_desc, [w_row + i * PART, 0], bar, words.slice(i * OWN, OWN))


@gluon.jit
def _await_rows(
    counter_ptr, wanted, start, w_desc, w_row, slot, parity, words, full, empty,
    BLOCK: gl.constexpr, COLUMNS: gl.constexpr, STEPS: gl.constexpr,
):  # fmt: skip
    """Until the counter is at `wanted`, once the weights of a down item's first step are asked for: fill the ring.

    Returns for how many steps they are now, the first weight row of the next one, and `start`.
    """
    STAGES: gl.constexpr = words.shape[0]
    RUNS: gl.constexpr = SLOT // BLOCK
    ahead: gl.constexpr = STEPS if STEPS < STAGES else STAGES
    loaded = 1
    if _count(counter_ptr) < wanted:
        loaded = ahead
        for _ in range(1, ahead):
            slot, parity = advance(slot, parity, 1, STAGES)
            mbarrier.wait(empty.index(slot), parity)
            _load_weights(w_desc, w_row, full.index(slot), words.index(slot), BLOCK, 1, COLUMNS)
            w_row += RUNS * COLUMNS
        start += _await(counter_ptr, wanted)  # what comes later uses it
    return loaded, w_row, start


@gluon.jit
def _row_ptrs(x, x_stride, index_ptr, start, rows, GATE_UP: gl.constexpr, HEIGHTS: gl.constexpr):
    """Of a tile's rows, 8 by 8, the addresses of half of a run's columns, and which there are."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])  # 16 bytes of a thread
    m = gl.arange(0, HEIGHT, gl.SliceLayout(1, layout))
    k = gl.arange(0, HALF, gl.SliceLayout(0, layout))
    ptrs = ()
    live = ()
    for j in gl.static_range(HEIGHTS):
        row = start + j * HEIGHT + m
        exists = j * HEIGHT + m < rows
        if GATE_UP:
            row = gl.load(index_ptr + row, mask=exists, other=0)
        ptrs = _append(ptrs, x + gl.expand_dims(row.to(gl.int64) * x_stride, 1) + gl.expand_dims(k, 0))
        live = _append(live, gl.expand_dims(exists, 1))
    return ptrs, live


@gluon.jit
def _load(
    x, x_stride, index_ptr, w_desc, scale_ptr, tile, expert, start, rows, block, counter_ptr, wanted,
    claims_ptr, items, up_items, tiles_ptr, slot, parity, words, scales, xs, told, full, empty,
    DEPTH: gl.constexpr, COLUMNS: gl.constexpr, GATE_UP: gl.constexpr, BLOCK: gl.constexpr, HEIGHTS: gl.constexpr,
    UP_BLOCKS: gl.constexpr, DOWN_BLOCKS: gl.constexpr,
):  # fmt: skip
    """Load an item. COLUMNS: of its product's result. Down's token rows are there once the counter is at `wanted`; the
    ring is filled with weights until then.

    Returns slot and parity after it, the next item and its `_entry`.
    """
    STAGES: gl.constexpr = words.shape[0]
    PARTS: gl.constexpr = 2 if GATE_UP else 1
    OWN: gl.constexpr = BLOCK // PARTS
    RUNS: gl.constexpr = SLOT // BLOCK
    SLICES: gl.constexpr = 2 * RUNS * HEIGHTS
    steps: gl.constexpr = DEPTH // (RUNS * 128)
    claim_at: gl.constexpr = steps - CLAIM if steps > CLAIM else 0
    w_row = expert * (steps * RUNS * PARTS * COLUMNS) + block * OWN
    scale_ptrs = scale_ptr + w_row + gl.arange(0, OWN, gl.BlockedLayout([4], [32], [1], [0]))
    mbarrier.wait(empty.index(slot), parity)
    _tell(told, slot, rows if GATE_UP else -rows, tile, expert, start, block)
    _load_weights(w_desc, w_row, full.index(slot), words.index(slot), BLOCK, PARTS, COLUMNS)
    w_row += RUNS * PARTS * COLUMNS
    loaded = 1
    if not GATE_UP:
        loaded, w_row, start = _await_rows(
            counter_ptr, wanted, start, w_desc, w_row, slot, parity, words, full, empty, BLOCK, COLUMNS, steps
        )  # fmt: skip
    ptrs, live = _row_ptrs(x, x_stride, index_ptr, start, rows, GATE_UP, HEIGHTS)
    claim = 0
    next_item = 0
    entry = (0, 0, 0, 0, 0, 0)
    for step in range(steps):
        bar = full.index(slot)
        if step == claim_at:
            claim = _claim(claims_ptr)
        if step >= loaded:
            mbarrier.wait(empty.index(slot), parity)
            _load_weights(w_desc, w_row, bar, words.index(slot), BLOCK, PARTS, COLUMNS)
            w_row += RUNS * PARTS * COLUMNS
        for i in gl.static_range(RUNS * PARTS):
            to = scales.index(slot).slice(i * OWN, OWN)
            async_copy.async_copy_global_to_shared(to, scale_ptrs + i * COLUMNS)
        for j in gl.static_range(HEIGHTS):
            if rows > j * HEIGHT:
                for i in gl.static_range(2 * RUNS):
                    async_copy.async_copy_global_to_shared(
                        xs.index(SLICES * slot + i * HEIGHTS + j), ptrs[j] + (step * RUNS * 128 + i * HALF),
                        mask=live[j],
                    )  # fmt: skip
        async_copy.mbarrier_arrive(bar, increment_count=False)
        scale_ptrs += RUNS * PARTS * COLUMNS
        slot, parity = advance(slot, parity, 1, STAGES)
        if step == min(claim_at + 1, steps - 1):
            next_item = _claimed(claim)
            entry = _entry(next_item, items, up_items, tiles_ptr, UP_BLOCKS, DOWN_BLOCKS)
    return slot, parity, next_item, entry


@gluon.jit
def _read(words, scales, BLOCK: gl.constexpr, FIRST: gl.constexpr, GATE_UP: gl.constexpr):
    """What a thread has of 64 weight rows from FIRST on by 128 of K: four words of each row, and their scales."""
    if GATE_UP:
        part: gl.constexpr = gl.SliceLayout(1, WORDS_OF_PART)
        gate: gl.constexpr = FIRST // 2
        up: gl.constexpr = BLOCK // 2 + gate
        packed = gl.join(words.slice(gate, 32).load(WORDS_OF_PART), words.slice(up, 32).load(WORDS_OF_PART))
        packed = packed.reshape([4, 8, 16, 2]).permute((0, 3, 1, 2)).reshape([64, 16])
        packed = gl.convert_layout(packed, WORDS_OF_THREAD)
        scale = gl.join(scales.slice(gate, 32).load(part), scales.slice(up, 32).load(part))
        scale = scale.reshape([4, 8, 2]).permute((0, 2, 1)).reshape([64])
        scale = gl.convert_layout(scale, gl.SliceLayout(1, WORDS_OF_THREAD))
    else:
        packed = words.slice(FIRST, 64).load(WORDS_OF_THREAD)
        scale = scales.slice(FIRST, 64).load(gl.SliceLayout(1, WORDS_OF_THREAD))
    packed = packed.to(gl.uint32, bitcast=True).reshape([64, 4, 2, 2]).permute((0, 1, 3, 2))
    first, second = packed.split()
    word0, word1 = first.split()
    word2, word3 = second.split()
    scale = gl.expand_dims(scale.to(gl.uint32, bitcast=True), 1)
    scale = gl.convert_layout(scale, word0.type.layout, assert_trivial=True)
    return word0, word1, word2, word3, scale.broadcast_to([64, 4])


@gluon.jit
def _rows(xs, first, N: gl.constexpr):
    """N times 8 token rows by half of a run's columns."""
    x = ()
    for j in gl.static_range(N):
        x = _append(x, xs.index(first + j).permute((1, 0)).load(gl.DotOperandLayout(1, PRODUCT, 2)))
    return x


@gluon.jit
def _add_products(even, odd, scale, SECOND: gl.constexpr, x, acc, FIRST: gl.constexpr):
    """Add the products of 64 weight rows and half of a run's columns to the accumulators from FIRST on."""
    w = widen_mxfp4_half(even, odd, scale, SECOND, True)
    w = gl.convert_layout(w, gl.DotOperandLayout(0, PRODUCT, 2), assert_trivial=True)
    for j in gl.static_range(len(x)):
        acc = _append(acc[: FIRST + j], mma_v2(w, x[j], acc[FIRST + j])) + acc[FIRST + j + 1 :]
    return acc


@gluon.jit
def _multiply(
    slot, parity, words, scales, xs, full, empty, DEPTH: gl.constexpr, GATE_UP: gl.constexpr, BLOCK: gl.constexpr,
    HEIGHTS: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    """Slot and parity after an item, and [64, 8] for each 64 of its weight rows, for each 8 of up to 8 * N tokens."""
    STAGES: gl.constexpr = words.shape[0]
    RUNS: gl.constexpr = SLOT // BLOCK
    acc = ()
    for _ in gl.static_range(BLOCK // 64 * N):
        acc = _append(acc, gl.zeros((64, HEIGHT), gl.float32, PRODUCT))
    for _ in range(DEPTH // (RUNS * 128)):
        mbarrier.wait(full.index(slot), parity)
        for run in gl.static_range(RUNS):
            w, s = words.index(slot).slice(run * BLOCK, BLOCK), scales.index(slot).slice(run * BLOCK, BLOCK)
            read = ()
            for first in gl.static_range(0, BLOCK, 64):
                read = _append(read, _read(w, s, BLOCK, first, GATE_UP))
            x0 = _rows(xs, (slot * RUNS + run) * 2 * HEIGHTS, N)
            x1 = _rows(xs, (slot * RUNS + run) * 2 * HEIGHTS + HEIGHTS, N)
            if run == RUNS - 1:
                mbarrier.arrive(empty.index(slot))
            for b in gl.static_range(BLOCK // 64):
                acc = _add_products(read[b][0], read[b][1], read[b][4], False, x0, acc, b * N)
            for b in gl.static_range(BLOCK // 64):
                acc = _add_products(read[b][2], read[b][3], read[b][4], True, x1, acc, b * N)
        slot, parity = advance(slot, parity, 1, STAGES)
    return slot, parity, acc


@gluon.jit
def _store(result, out_ptr, out_stride, target, rows, column, layout: gl.constexpr):
    """result: [columns from `column` on, 8 rows]. target: where these are to go."""
    result = gl.convert_layout(result.to(out_ptr.dtype.element_ty).permute((1, 0)), layout)
    live = gl.arange(0, HEIGHT, gl.SliceLayout(1, layout)) < rows
    n = column + gl.arange(0, result.shape[1], gl.SliceLayout(0, layout))
    out_ptrs = out_ptr + gl.expand_dims(target.to(gl.int64) * out_stride, 1) + gl.expand_dims(n, 0)
    gl.store(out_ptrs, result, mask=gl.expand_dims(live, 1))


@gluon.jit
def _compute(
    slot, parity, words, scales, xs, full, empty, bias_ptr, out_ptr, out_stride, order_ptr, expert, start, rows, block,
    DEPTH: gl.constexpr, COLUMNS: gl.constexpr, GATE_UP: gl.constexpr, BIAS: gl.constexpr, LIMIT: gl.constexpr,
    BLOCK: gl.constexpr, HEIGHTS: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    """A whole item of up to 8 * N rows; slot and parity after it. DEPTH and COLUMNS: of its product."""
    WIDTH: gl.constexpr = 32 if GATE_UP else 64
    layout: gl.constexpr = STORED_PART if GATE_UP else STORED
    m = gl.arange(0, HEIGHT, gl.SliceLayout(1, layout))
    targets = ()
    for j in gl.static_range(N):
        target = start + j * HEIGHT + m
        if not GATE_UP:  # early: it is not waited for
            target = gl.load(order_ptr + target, mask=j * HEIGHT + m < rows, other=0)
        targets = _append(targets, target)
    slot, parity, acc = _multiply(slot, parity, words, scales, xs, full, empty, DEPTH, GATE_UP, BLOCK, HEIGHTS, N)
    for b in gl.static_range(BLOCK // 64):
        column = (block * (BLOCK // 64) + b) * WIDTH
        for j in gl.static_range(N):
            result = acc[b * N + j] * 65536.0  # what widened weights lack
            if GATE_UP:
                gate, up = result.reshape([4, 2, 8, HEIGHT]).permute((0, 2, 3, 1)).split()
                gate, up = gate.reshape([WIDTH, HEIGHT]), up.reshape([WIDTH, HEIGHT])
                n = column + gl.arange(0, WIDTH, gl.SliceLayout(1, gate.type.layout))
                result = gated(gate, up, bias_ptr, expert, n, COLUMNS, True, BIAS, LIMIT)
            elif BIAS:
                n = column + gl.arange(0, WIDTH, gl.SliceLayout(1, PRODUCT))
                result = add_bias(result, bias_ptr + expert * COLUMNS, n, n < COLUMNS, True)
            _store(result, out_ptr, out_stride, targets[j], rows - j * HEIGHT, column, layout)
    return slot, parity


@gluon.jit
def _produce(
    x_ptr, x_stride, w13_desc, scales13, w2_desc, scales2, act_ptr, rows_ptr, tiles_ptr, num_tiles_ptr, claims_ptr, sms,
    words, scales, xs, told, full, empty, HIDDEN: gl.constexpr, INTERMEDIATE: gl.constexpr,
    BLOCK: gl.constexpr, HEIGHTS: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    up_blocks: gl.constexpr = INTERMEDIATE // (BLOCK // 2)
    down_blocks: gl.constexpr = HIDDEN // BLOCK
    BLOCK_M: gl.constexpr = HEIGHTS * HEIGHT
    turn = gl.program_id(0) // sms
    if turn > 0:  # of those that share a multiprocessor: so the first items are spread over all of these
        _sleep(turn * 250)
    item = _claimed(_claim(claims_ptr))
    tiles = gl.load(num_tiles_ptr)
    up_items = tiles * up_blocks
    items = up_items + tiles * down_blocks
    slot = 0
    parity = 1
    entry = _entry(item, items, up_items, tiles_ptr, up_blocks, down_blocks)
    while item < items:
        some, expert, start, first, count, end = entry
        if item < up_items:
            tile, start, rows, block = _locate(item, some, start, first, count, end, up_blocks, BLOCK_M, GROUP_M)
            slot, parity, item, entry = _load(
                x_ptr, x_stride, rows_ptr, w13_desc, scales13, tile, expert, start, rows, block, tiles_ptr, 0,
                claims_ptr, items, up_items, tiles_ptr, slot, parity, words, scales, xs, told, full, empty,
                HIDDEN, INTERMEDIATE, True, BLOCK, HEIGHTS, up_blocks, down_blocks,
            )  # fmt: skip
        else:
            tile, start, rows, block = _locate(
                item - up_items, some, start, first, count, end, down_blocks, BLOCK_M, GROUP_M
            )  # fmt: skip
            slot, parity, item, entry = _load(
                act_ptr, INTERMEDIATE, rows_ptr, w2_desc, scales2, tile, expert, start, rows, block,
                tiles_ptr + TILE_FIELDS * tile + COUNTER_FIELD, up_blocks,
                claims_ptr, items, up_items, tiles_ptr, slot, parity, words, scales, xs, told, full, empty,
                INTERMEDIATE, HIDDEN, False, BLOCK, HEIGHTS, up_blocks, down_blocks,
            )  # fmt: skip
    mbarrier.wait(empty.index(slot), parity)
    _tell(told, slot, 0, 0, 0, 0, 0)
    mbarrier.expect(full.index(slot), 0)
    async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
    _finish(claims_ptr, gl.num_programs(0) - 1)


@gluon.jit
def _consume(
    bias13_ptr, bias2_ptr, act_ptr, out_ptr, out_stride, order_ptr, tiles_ptr, words, scales, xs, told, full, empty,
    HIDDEN: gl.constexpr, INTERMEDIATE: gl.constexpr, BLOCK: gl.constexpr, HEIGHTS: gl.constexpr,
    BIAS: gl.constexpr, LIMIT: gl.constexpr, OUT_AT: gl.constexpr,
):  # fmt: skip
    if OUT_AT:
        out_ptr = gl.multiple_of(gl.load(out_ptr).to(gl.pointer_type(gl.bfloat16)), 16)
    last: gl.constexpr = INTERMEDIATE // (BLOCK // 2) + HIDDEN // BLOCK - 1
    slot = 0
    parity = 0
    mbarrier.wait(full.index(slot), parity)
    rows = _hear(told, slot, 0)
    while rows != 0:
        counter_ptr = tiles_ptr + TILE_FIELDS * _hear(told, slot, 1) + COUNTER_FIELD
        expert = _hear(told, slot, 2)
        start = _hear(told, slot, 3)
        block = _hear(told, slot, 4)
        if rows > 0:
            for n in gl.static_range(HEIGHTS):
                if (rows > n * HEIGHT) & (rows <= (n + 1) * HEIGHT):
                    slot, parity = _compute(
                        slot, parity, words, scales, xs, full, empty, bias13_ptr, act_ptr, INTERMEDIATE, order_ptr,
                        expert, start, rows, block, HIDDEN, INTERMEDIATE, True, BIAS, LIMIT, BLOCK, HEIGHTS, n + 1,
                    )  # fmt: skip
            gl.thread_barrier()
            gl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
        else:
            rows = -rows
            for n in gl.static_range(HEIGHTS):
                if (rows > n * HEIGHT) & (rows <= (n + 1) * HEIGHT):
                    slot, parity = _compute(
                        slot, parity, words, scales, xs, full, empty, bias2_ptr, out_ptr, out_stride, order_ptr,
                        expert, start, rows, block, INTERMEDIATE, HIDDEN, False, BIAS, LIMIT, BLOCK, HEIGHTS, n + 1,
                    )  # fmt: skip
            leave(counter_ptr, last)
        mbarrier.wait(full.index(slot), parity)
        rows = _hear(told, slot, 0)


@gluon.jit(do_not_specialize=["sms"])
def mxfp4_kernel(
    x_ptr, x_stride, w13_desc, scales13, w2_desc, scales2, bias13_ptr, bias2_ptr, act_ptr, out_ptr, out_stride,
    rows_ptr, order_ptr, tiles_ptr, num_tiles_ptr, claims_ptr, sms,
    HIDDEN: gl.constexpr, INTERMEDIATE: gl.constexpr, BLOCK: gl.constexpr, HEIGHTS: gl.constexpr,
    STAGES: gl.constexpr, GROUP_M: gl.constexpr, BIAS: gl.constexpr, LIMIT: gl.constexpr, OUT_AT: gl.constexpr,
):  # fmt: skip
    """As `triton_small_tiles.small_tiles_kernel` with a `Grouping`, both products. w13_desc and w2_desc: all rows of
    `QuantizedWeight.data`, BLOCK / 2 and BLOCK at a time. HIDDEN and INTERMEDIATE: multiples of STEP; tiles of 8 *
    HEIGHTS rows. claims_ptr: two counters, 0 before and after; sms: multiprocessors."""
    words = gl.allocate_shared_memory(gl.int32, [STAGES, SLOT, 16], WORDS)
    scales = gl.allocate_shared_memory(gl.int32, [STAGES, SLOT], NUMBERS)
    xs = gl.allocate_shared_memory(gl.bfloat16, [STAGES * (SLOT // BLOCK) * 2 * HEIGHTS, HEIGHT, HALF], SHARED)
    told = gl.allocate_shared_memory(gl.int32, [5 * STAGES, 1], NUMBERS)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + 32)  # TMA, and each thread of the loading warp
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (_consume, (bias13_ptr, bias2_ptr, act_ptr, out_ptr, out_stride, order_ptr, tiles_ptr,
                        words, scales, xs, told, full, empty,
                        HIDDEN, INTERMEDIATE, BLOCK, HEIGHTS, BIAS, LIMIT, OUT_AT)),
            (_produce, (x_ptr, x_stride, w13_desc, scales13, w2_desc, scales2, act_ptr, rows_ptr, tiles_ptr,
                        num_tiles_ptr, claims_ptr, sms, words, scales, xs, told, full, empty,
                        HIDDEN, INTERMEDIATE, BLOCK, HEIGHTS, GROUP_M)),
        ],
        [1],
        [40],  # registers of a thread of the producer
    )  # fmt: skip


def ffn(
    x: torch.Tensor, w13: QuantizedWeight, w2: QuantizedWeight, biases: tuple[torch.Tensor, torch.Tensor] | None,
    limit: float, activations: torch.Tensor, out: torch.Tensor, grouping: Grouping, claims: torch.Tensor, sms: int,
    tiling: RingTiling,
) -> None:  # fmt: skip
    """Both products of `QuantizedExperts.ffn`. claims: [2] int32, zeros, as they are again afterwards; sms: how many
    multiprocessors there are."""
    x = aligned(x)
    hidden, intermediate, out_at = w2.shape[1], w2.shape[2], out.dtype == torch.int64
    w13_desc = TensorDescriptor.from_tensor(w13.data.view(-1, 16), [tiling.block // 2, 16], WORDS.value)
    w2_desc = TensorDescriptor.from_tensor(w2.data.view(-1, 16), [tiling.block, 16], WORDS.value)
    bias13, bias2 = biases or (w13.scale, w2.scale)  # not read without biases
    items = grouping.max_tiles * (2 * intermediate + hidden) // tiling.block
    mxfp4_kernel[(min(items, sms * tiling.programs),)](
        x, x.stride(0), w13_desc, w13.scale, w2_desc, w2.scale, bias13, bias2, activations, out,
        hidden if out_at else out.stride(0), grouping.rows, grouping.order, grouping.tiles, grouping.num_tiles,
        claims, sms, HIDDEN=hidden, INTERMEDIATE=intermediate,
        BLOCK=tiling.block, HEIGHTS=tiling.block_m // HEIGHT.value, STAGES=tiling.stages, GROUP_M=tiling.group_m,
        BIAS=biases is not None, LIMIT=float(limit), OUT_AT=out_at, num_warps=4, maxnreg=tiling.registers,
    )  # fmt: skip
