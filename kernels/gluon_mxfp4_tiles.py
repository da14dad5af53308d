"""The expert FFN on MXFP4 weights in tiles of up to 16 rows, warp-specialised: in Gluon, for Hopper.

A program takes one item: a tile by a block of 64 weight rows of gate and as many of up, or of 128 of down.

* One warp loads, step after step of 256 of K, into a ring of slots in shared memory: weights by TMA, scales and token
  rows by cp.async.
* Four warps multiply, each its own weight rows: a thread widens the words that it feeds to the tensor cores.

Weights are the left operand, tokens the width, 8 of an mma: a tile of up to 8 rows has a loop of its own. It is mma and
not wgmma, which takes as long for 8 tokens as for 16, and holds registers of the weights until it ends.

Products, hand-over and grid are those of `triton_small_tiles`, and so are the bits: one accumulator that runs over K
upwards, 16 at a time.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.gluon_grouped_gemm import SHARED, advance
from kernels.quantized_weight import COLUMNS, QuantizedWeight
from kernels.triton_activation import add_bias, gated
from kernels.triton_grouping import COUNTER_FIELD, TILE_FIELDS, Grouping
from kernels.triton_handover import leave
from kernels.triton_tiling import RingTiling
from kernels.triton_widen import widen_mxfp4_half

RUNS = gl.constexpr(2)
"""Of 128 columns in a step."""
STEP = gl.constexpr(RUNS * COLUMNS)
HALF = gl.constexpr(64)
"""Of a run's columns: what swizzled token rows of 128 bytes hold."""
BLOCK = gl.constexpr(128)
"""Weight rows of an item."""
HEIGHT = gl.constexpr(8)
"""Rows of a tile that have a loop of their own."""
WORDS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=32))
"""Of the weights, 16 words in a row."""
SCALES = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
PRODUCT = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8]))
"""Of 64 weight rows by the rows of a tile."""
WORDS_OF_THREAD = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0]], [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 16]
    )
)
"""Of 64 weight rows by 16 words: a thread has the words that it feeds to the tensor cores."""


def admits(w13: QuantizedWeight, w2: QuantizedWeight) -> bool:
    """Whether the kernel can multiply by such weights: MXFP4, both depths whole steps, compiled, on Hopper."""
    return (
        w13.mxfp4
        and (w13.shape[2], w2.shape[2]) == (w2.shape[1], w13.shape[1] // 2)  # nothing filled up
        and w13.shape[2] % STEP.value == 0
        and w2.shape[2] % STEP.value == 0
        and w13.data.is_cuda
        and not triton.knobs.runtime.interpret
        and torch.cuda.get_device_capability(w13.data.device) == (9, 0)
    )


@gluon.constexpr_function
def _store_layout(n):
    """Of n tile rows by 64 columns: a warp keeps the columns that it multiplied, a thread stores n bytes of a row."""
    rows = [[1, 0], [2, 0], [4, 0], [8, 0]][: n.bit_length() - 1]
    columns = [[0, 1], [0, 2], [0, 4], [0, 8]]
    own = n.bit_length() - 2
    return gl.DistributedLinearLayout(columns[:own], [*columns[own:], *rows], [[0, 16], [0, 32]], [], [n, 64])


@gluon.jit
def _locate(
    item, up_items, tiles_ptr,
    UP_BLOCKS: gl.constexpr, DOWN_BLOCKS: gl.constexpr, BLOCK_M: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """An item's tile, expert, first position and rows, and its block; see `triton_grouped_gemm`."""
    n_blocks = gl.where(item < up_items, UP_BLOCKS, DOWN_BLOCKS)
    item = gl.where(item < up_items, item, item - up_items)
    some_tile = item // n_blocks  # of the same expert
    entry = tiles_ptr + TILE_FIELDS * some_tile
    expert = gl.load(entry)
    start = gl.load(entry + 1)
    first = gl.load(entry + 3)
    tiles = gl.load(entry + 4)
    end = gl.load(entry + 5)
    inside = item - first * n_blocks
    begin = (inside // (GROUP_M * n_blocks)) * GROUP_M
    height = gl.minimum(tiles - begin, GROUP_M)
    rest = inside - begin * n_blocks
    tile = first + begin + rest % height
    start += (tile - some_tile) * BLOCK_M
    return tile, expert, start, gl.minimum(end - start, BLOCK_M), rest // height


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
def _load_weights(w_desc, w_row, bar, words, PARTS: gl.constexpr, PART: gl.constexpr):
    mbarrier.expect(bar, RUNS * BLOCK * 64)
    for i in gl.static_range(RUNS * PARTS):
        to = words.slice(i * (BLOCK // PARTS), BLOCK // PARTS)
        tma.async_copy_global_to_shared(w_desc, [w_row + i * PART, 0], bar, to)


@gluon.jit
def _load(
    x, x_stride, index_ptr, w_desc, scale_ptr, expert, start, rows, block, counter_ptr, wanted,
    words, scales, xs, full, empty,
    DEPTH: gl.constexpr, COLUMNS: gl.constexpr, GATE_UP: gl.constexpr, WAIT: gl.constexpr,
):  # fmt: skip
    """The producer. COLUMNS: of the product's result. With WAIT the token rows are there once the counter is at
    `wanted`; the ring is filled with weights until then."""
    STAGES: gl.constexpr = words.shape[0]
    BLOCK_M: gl.constexpr = xs.shape[1]
    PARTS: gl.constexpr = 2 if GATE_UP else 1
    OWN: gl.constexpr = BLOCK // PARTS
    steps: gl.constexpr = DEPTH // STEP
    ahead: gl.constexpr = steps if steps < STAGES else STAGES
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])  # 16 bytes of a thread
    m = gl.arange(0, HEIGHT, gl.SliceLayout(1, layout))
    k = gl.arange(0, HALF, gl.SliceLayout(0, layout))
    w_row = expert * (steps * RUNS * PARTS * COLUMNS) + block * OWN
    scale_ptrs = scale_ptr + w_row + gl.arange(0, OWN, gl.BlockedLayout([4], [32], [1], [0]))
    loaded = 0
    if WAIT:  # noqa: SIM102 - one is known when it is compiled
        if _count(counter_ptr) < wanted:
            loaded = ahead
            for slot in gl.static_range(ahead):
                _load_weights(w_desc, w_row, full.index(slot), words.index(slot), PARTS, COLUMNS)
                w_row += RUNS * PARTS * COLUMNS
            start += _await(counter_ptr, wanted)
    upper = start + m
    lower = start + m + HEIGHT
    upper_live = m < rows
    lower_live = m + HEIGHT < rows
    if GATE_UP:
        upper = gl.load(index_ptr + upper, mask=upper_live, other=0)
        lower = gl.load(index_ptr + lower, mask=lower_live, other=0)
    upper_ptrs = x + gl.expand_dims(upper.to(gl.int64) * x_stride, 1) + gl.expand_dims(k, 0)
    lower_ptrs = x + gl.expand_dims(lower.to(gl.int64) * x_stride, 1) + gl.expand_dims(k, 0)
    slot = 0
    parity = 1
    for step in range(steps):
        bar = full.index(slot)
        if step >= loaded:
            mbarrier.wait(empty.index(slot), parity)
            _load_weights(w_desc, w_row, bar, words.index(slot), PARTS, COLUMNS)
            w_row += RUNS * PARTS * COLUMNS
        for i in gl.static_range(RUNS * PARTS):
            to = scales.index(slot).slice(i * OWN, OWN)
            async_copy.async_copy_global_to_shared(to, scale_ptrs + i * COLUMNS)
        for i in gl.static_range(2 * RUNS):
            to = xs.index(2 * RUNS * slot + i).slice(0, HEIGHT)
            async_copy.async_copy_global_to_shared(to, upper_ptrs + i * HALF, mask=gl.expand_dims(upper_live, 1))
        if BLOCK_M > HEIGHT:  # noqa: SIM102 - the same
            if rows > HEIGHT:
                for i in gl.static_range(2 * RUNS):
                    to = xs.index(2 * RUNS * slot + i).slice(HEIGHT, HEIGHT)
                    async_copy.async_copy_global_to_shared(
                        to, lower_ptrs + i * HALF, mask=gl.expand_dims(lower_live, 1)
                    )  # fmt: skip
        async_copy.mbarrier_arrive(bar, increment_count=False)
        scale_ptrs += RUNS * PARTS * COLUMNS
        upper_ptrs += STEP
        lower_ptrs += STEP
        slot, parity = advance(slot, parity, 1, STAGES)


@gluon.jit
def _read(words, scales):
    """What a thread has of 64 weight rows by 128 of K: four words of each row, and their scales."""
    packed = words.load(WORDS_OF_THREAD).to(gl.uint32, bitcast=True).reshape([64, 4, 2, 2]).permute((0, 1, 3, 2))
    scale = scales.load(gl.SliceLayout(1, WORDS_OF_THREAD)).to(gl.uint32, bitcast=True)
    first, second = packed.split()
    word0, word1 = first.split()
    word2, word3 = second.split()
    scale = gl.convert_layout(gl.expand_dims(scale, 1), word0.type.layout, assert_trivial=True)
    return word0, word1, word2, word3, scale.broadcast_to([64, 4])


@gluon.jit
def _add_product(even, odd, scale, SECOND: gl.constexpr, x, acc):
    """Add the product of one half of a run's columns."""
    w = widen_mxfp4_half(even, odd, scale, SECOND, True)
    return mma_v2(gl.convert_layout(w, gl.DotOperandLayout(0, PRODUCT, 2), assert_trivial=True), x, acc)


@gluon.jit
def _multiply(words, scales, xs, full, empty, DEPTH: gl.constexpr, N: gl.constexpr):
    """Both times 64 of an item's weight rows, [64, N] each."""
    STAGES: gl.constexpr = words.shape[0]
    operand: gl.constexpr = gl.DotOperandLayout(1, PRODUCT, 2)
    acc0 = gl.zeros((64, N), gl.float32, PRODUCT)
    acc1 = gl.zeros((64, N), gl.float32, PRODUCT)
    slot = 0
    parity = 0
    for _ in range(DEPTH // STEP):
        mbarrier.wait(full.index(slot), parity)
        for run in gl.static_range(RUNS):
            w, s = words.index(slot).slice(run * BLOCK, BLOCK), scales.index(slot).slice(run * BLOCK, BLOCK)
            a0, a1, a2, a3, a_scale = _read(w.slice(0, 64), s.slice(0, 64))
            b0, b1, b2, b3, b_scale = _read(w.slice(64, 64), s.slice(64, 64))
            x0 = xs.index(2 * (RUNS * slot + run)).slice(0, N).permute((1, 0)).load(operand)
            x1 = xs.index(2 * (RUNS * slot + run) + 1).slice(0, N).permute((1, 0)).load(operand)
            if run == RUNS - 1:
                mbarrier.arrive(empty.index(slot))
            acc0 = _add_product(a0, a1, a_scale, False, x0, acc0)
            acc1 = _add_product(b0, b1, b_scale, False, x0, acc1)
            acc0 = _add_product(a2, a3, a_scale, True, x1, acc0)
            acc1 = _add_product(b2, b3, b_scale, True, x1, acc1)
        slot, parity = advance(slot, parity, 1, STAGES)
    return acc0 * 65536.0, acc1 * 65536.0  # what widened weights lack


@gluon.jit
def _store(result, out_ptr, out_stride, target, rows, column, LISTED: gl.constexpr):
    """result: [64 columns from `column` on, tile rows]. target: the first row, or with LISTED where the rows are."""
    layout: gl.constexpr = _store_layout(result.shape[1])
    result = gl.convert_layout(result.to(out_ptr.dtype.element_ty).permute((1, 0)), layout)
    m = gl.arange(0, result.shape[0], gl.SliceLayout(1, layout))
    live = m < rows
    row = gl.load(target + m, mask=live, other=0) if LISTED else target + m
    n = column + gl.arange(0, 64, gl.SliceLayout(0, layout))
    out_ptrs = out_ptr + gl.expand_dims(row.to(gl.int64) * out_stride, 1) + gl.expand_dims(n, 0)
    gl.store(out_ptrs, result, mask=gl.expand_dims(live, 1))


@gluon.jit
def _compute_rows(
    words, scales, xs, full, empty, bias_ptr, out_ptr, out_stride, order_ptr, expert, start, rows, block,
    DEPTH: gl.constexpr, COLUMNS: gl.constexpr, GATE_UP: gl.constexpr, BIAS: gl.constexpr, LIMIT: gl.constexpr,
    N: gl.constexpr,
):  # fmt: skip
    """A whole item of up to N rows. DEPTH and COLUMNS: of its product."""
    acc0, acc1 = _multiply(words, scales, xs, full, empty, DEPTH, N)
    if GATE_UP:
        n = block * 64 + gl.arange(0, 64, gl.SliceLayout(1, PRODUCT))
        result = gated(acc0, acc1, bias_ptr, expert, n, COLUMNS, True, BIAS, LIMIT)
        _store(result, out_ptr, out_stride, start, rows, block * 64, False)
    else:
        for half in gl.static_range(2):
            acc = acc0 if half == 0 else acc1
            column = block * BLOCK + half * 64
            if BIAS:
                n = column + gl.arange(0, 64, gl.SliceLayout(1, PRODUCT))
                acc = add_bias(acc, bias_ptr + expert * COLUMNS, n, n < COLUMNS, True)
            _store(acc, out_ptr, out_stride, order_ptr + start, rows, column, True)


@gluon.jit
def _compute(
    words, scales, xs, full, empty, bias_ptr, out_ptr, out_stride, order_ptr, expert, start, rows, block,
    DEPTH: gl.constexpr, COLUMNS: gl.constexpr, GATE_UP: gl.constexpr, BIAS: gl.constexpr, LIMIT: gl.constexpr,
    BLOCK_M: gl.constexpr,
):  # fmt: skip
    """`_compute_rows` for a tile's height, or for HEIGHT where it has no more rows."""
    if rows <= HEIGHT:
        _compute_rows(
            words, scales, xs, full, empty, bias_ptr, out_ptr, out_stride, order_ptr,
            expert, start, rows, block, DEPTH, COLUMNS, GATE_UP, BIAS, LIMIT, HEIGHT,
        )  # fmt: skip
    elif BLOCK_M > HEIGHT:
        _compute_rows(
            words, scales, xs, full, empty, bias_ptr, out_ptr, out_stride, order_ptr,
            expert, start, rows, block, DEPTH, COLUMNS, GATE_UP, BIAS, LIMIT, BLOCK_M,
        )  # fmt: skip


@gluon.jit
def _produce(
    x_ptr, x_stride, w13_desc, scales13, w2_desc, scales2, act_ptr, rows_ptr, tiles_ptr, num_tiles_ptr,
    words, scales, xs, full, empty,
    HIDDEN: gl.constexpr, INTERMEDIATE: gl.constexpr, GATE_UP: gl.constexpr, DOWN: gl.constexpr,
    GROUP_M: gl.constexpr,
):  # fmt: skip
    BLOCK_M: gl.constexpr = xs.shape[1]
    up_blocks: gl.constexpr = INTERMEDIATE // 64 if GATE_UP else 0
    down_blocks: gl.constexpr = HIDDEN // BLOCK if DOWN else 0
    tiles = gl.load(num_tiles_ptr)
    item = gl.program_id(0)
    if item < tiles * (up_blocks + down_blocks):
        tile, expert, start, rows, block = _locate(
            item, tiles * up_blocks, tiles_ptr, up_blocks, down_blocks, BLOCK_M, GROUP_M
        )  # fmt: skip
        if GATE_UP and item < tiles * up_blocks:
            _load(
                x_ptr, x_stride, rows_ptr, w13_desc, scales13, expert, start, rows, block, tiles_ptr, 0,
                words, scales, xs, full, empty, HIDDEN, INTERMEDIATE, True, False,
            )  # fmt: skip
        elif DOWN:
            _load(
                act_ptr, INTERMEDIATE, rows_ptr, w2_desc, scales2, expert, start, rows, block,
                tiles_ptr + TILE_FIELDS * tile + COUNTER_FIELD, up_blocks,
                words, scales, xs, full, empty, INTERMEDIATE, HIDDEN, False, GATE_UP,
            )  # fmt: skip


@gluon.jit
def _consume(
    bias13_ptr, bias2_ptr, act_ptr, out_ptr, out_stride, order_ptr, tiles_ptr, num_tiles_ptr,
    words, scales, xs, full, empty,
    HIDDEN: gl.constexpr, INTERMEDIATE: gl.constexpr, GATE_UP: gl.constexpr, DOWN: gl.constexpr,
    GROUP_M: gl.constexpr, BIAS: gl.constexpr, LIMIT: gl.constexpr, OUT_AT: gl.constexpr,
):  # fmt: skip
    BLOCK_M: gl.constexpr = xs.shape[1]
    if OUT_AT:
        out_ptr = gl.multiple_of(gl.load(out_ptr).to(gl.pointer_type(gl.bfloat16)), 16)
    up_blocks: gl.constexpr = INTERMEDIATE // 64 if GATE_UP else 0
    down_blocks: gl.constexpr = HIDDEN // BLOCK if DOWN else 0
    tiles = gl.load(num_tiles_ptr)
    item = gl.program_id(0)
    if item < tiles * (up_blocks + down_blocks):
        tile, expert, start, rows, block = _locate(
            item, tiles * up_blocks, tiles_ptr, up_blocks, down_blocks, BLOCK_M, GROUP_M
        )  # fmt: skip
        counter_ptr = tiles_ptr + TILE_FIELDS * tile + COUNTER_FIELD
        if GATE_UP and item < tiles * up_blocks:
            _compute(
                words, scales, xs, full, empty, bias13_ptr, act_ptr, INTERMEDIATE, order_ptr,
                expert, start, rows, block, HIDDEN, INTERMEDIATE, True, BIAS, LIMIT, BLOCK_M,
            )  # fmt: skip
            if DOWN:
                gl.thread_barrier()
                gl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
        elif DOWN:
            _compute(
                words, scales, xs, full, empty, bias2_ptr, out_ptr, out_stride, order_ptr,
                expert, start, rows, block, INTERMEDIATE, HIDDEN, False, BIAS, LIMIT, BLOCK_M,
            )  # fmt: skip
            if GATE_UP:
                leave(counter_ptr, up_blocks + down_blocks - 1)


@gluon.jit
def mxfp4_kernel(
    x_ptr, x_stride, w13_desc, scales13, w2_desc, scales2, bias13_ptr, bias2_ptr, act_ptr, out_ptr, out_stride,
    rows_ptr, order_ptr, tiles_ptr, num_tiles_ptr,
    HIDDEN: gl.constexpr, INTERMEDIATE: gl.constexpr, GATE_UP: gl.constexpr, DOWN: gl.constexpr,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
    BIAS: gl.constexpr, LIMIT: gl.constexpr, OUT_AT: gl.constexpr,
):  # fmt: skip
    """As `triton_small_tiles.small_tiles_kernel` with a `Grouping`. w13_desc and w2_desc: all rows of
    `QuantizedWeight.data`, 64 and 128 at a time. HIDDEN and INTERMEDIATE: multiples of STEP; BLOCK_M: 8 or 16."""
    words = gl.allocate_shared_memory(gl.int32, [STAGES, RUNS * BLOCK, 16], WORDS)
    scales = gl.allocate_shared_memory(gl.int32, [STAGES, RUNS * BLOCK], SCALES)
    xs = gl.allocate_shared_memory(gl.bfloat16, [2 * RUNS * STAGES, BLOCK_M, HALF], SHARED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + 32)  # TMA, and each thread of the loading warp
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (_consume, (bias13_ptr, bias2_ptr, act_ptr, out_ptr, out_stride, order_ptr, tiles_ptr, num_tiles_ptr,
                        words, scales, xs, full, empty,
                        HIDDEN, INTERMEDIATE, GATE_UP, DOWN, GROUP_M, BIAS, LIMIT, OUT_AT)),
            (_produce, (x_ptr, x_stride, w13_desc, scales13, w2_desc, scales2, act_ptr, rows_ptr, tiles_ptr,
                        num_tiles_ptr, words, scales, xs, full, empty,
                        HIDDEN, INTERMEDIATE, GATE_UP, DOWN, GROUP_M)),
        ],
        [1],
        [40],  # registers of a thread of the producer
    )  # fmt: skip


def ffn(
    x: torch.Tensor, w13: QuantizedWeight, w2: QuantizedWeight, biases: tuple[torch.Tensor, torch.Tensor] | None,
    limit: float, activations: torch.Tensor, out: torch.Tensor, grouping: Grouping, tiling: RingTiling,
) -> None:  # fmt: skip
    """Both products of `QuantizedExperts.ffn`."""
    if x.data_ptr() % 16 or x.stride(0) % 16:  # cp.async moves 16 bytes
        x = x.clone(memory_format=torch.contiguous_format)
    hidden, intermediate, out_at = w2.shape[1], w2.shape[2], out.dtype == torch.int64
    w13_desc = TensorDescriptor.from_tensor(w13.data.view(-1, 16), [BLOCK.value // 2, 16], WORDS.value)
    w2_desc = TensorDescriptor.from_tensor(w2.data.view(-1, 16), [BLOCK.value, 16], WORDS.value)
    bias13, bias2 = biases or (w13.scale, w2.scale)  # not read without biases
    for gate_up, down in [(True, True)] if tiling.one_launch else [(True, False), (False, True)]:
        blocks = gate_up * intermediate // 64 + down * hidden // BLOCK.value
        mxfp4_kernel[(grouping.max_tiles * blocks,)](
            x, x.stride(0), w13_desc, w13.scale, w2_desc, w2.scale, bias13, bias2, activations, out,
            hidden if out_at else out.stride(0), grouping.rows, grouping.order, grouping.tiles, grouping.num_tiles,
            HIDDEN=hidden, INTERMEDIATE=intermediate, GATE_UP=gate_up, DOWN=down,
            BLOCK_M=tiling.block_m, STAGES=tiling.stages, GROUP_M=tiling.group_m,
            BIAS=biases is not None, LIMIT=float(limit), OUT_AT=out_at, num_warps=4, maxnreg=tiling.registers,
        )  # fmt: skip
