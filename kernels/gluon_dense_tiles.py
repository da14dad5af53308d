"""The two grouped GEMMs for 21 to 76 rows per expert, where memory binds, warp-specialised: in Gluon, for Hopper.

A program has the multiprocessor to itself and strides over work items, a tile of up to 96 rows, mostly all of an
expert's, by 256 weight rows each (128 of gate and as many of up, or 256 of down):

* warps that load: step after step of 64 of K, item after item, into a ring of slots in shared memory, the weights of
  two steps at once: memory gives 256 bytes of a row faster than twice 128. Four of them gather the rows of gate/up,
  each on its own;
* two groups multiply, each two blocks of 64 weight rows, the left operand, by the rows of the tile. They give a slot
  back as soon as its products are done: one that waits for the next slot's would be one less to load into.

A tile takes the time of the next of a few heights (`heights`): there is a loop for each. Barriers: see
`gluon_grouped_gemm`.

The bits are those of `triton_grouped_gemm`: an accumulator per output element over K upwards, 16 at a time, and the
same functions after it.
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

from kernels import gluon_grouped_gemm
from kernels.gluon_grouped_gemm import GATHERERS, SHARED, aligned, following, locate
from kernels.triton_activation import add_bias, gated
from kernels.triton_grouping import Grouping
from kernels.triton_tiling import DenseTiling

BLOCK_K = gl.constexpr(64)
"""Of a step: what swizzled rows of 128 bytes hold."""
HALF = gl.constexpr(128)
"""Weight rows that one TMA loads: half of an item's."""
UPPER = gl.constexpr(64)
"""First rows of a tile: sizes in Triton are powers of two, and those of a tile need not be."""
BOX = gl.constexpr(16)
"""Rows that one TMA loads of the activations."""


def admits(w13: torch.Tensor, w2: torch.Tensor) -> bool:
    """Whether the kernel can multiply by these: compiled, on Hopper, in 16 bits, K a multiple of two steps'."""
    steps = 2 * BLOCK_K.value
    return gluon_grouped_gemm.admits(w13, w2) and w13.shape[2] % steps == 0 and w2.shape[2] % steps == 0


@gluon.constexpr_function
def heights(lower):
    """For how many rows there are loops: of the first UPPER rows of a tile, and of the `lower` ones after them."""
    return (16, 0), (32, 0), (UPPER.value, 0), *((UPPER.value, n) for n in (16, 32) if n <= lower)


@gluon.constexpr_function
def accumulator_layout(n):
    """Of 64 weight rows by n tile rows."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, n, 16])


@gluon.constexpr_function
def store_layout(n):
    """Of n tile rows by 64 columns: a warp keeps the columns that it multiplied, a thread stores 16 bytes."""
    rows = [[1 << i, 0] for i in range(n.bit_length() - 1)]
    own, columns = [[0, 1], [0, 2], [0, 4]], [[0, 8], [0, 16], [0, 32]]
    return gl.DistributedLinearLayout([*own, *rows[4:]], [columns[0], *rows[:4]], columns[1:], [], [n, 64])


@gluon.jit
def _load_weights(w_desc, w_row, to_second, k0, bar, next_bar, w, next_w):
    """Both halves of two steps', so that 256 bytes of each row are asked for at a time."""
    for half in gl.static_range(2):
        row = w_row + half * to_second
        tma.async_copy_global_to_shared(w_desc, [row, k0], bar, w.slice(half * HALF, HALF))
        tma.async_copy_global_to_shared(w_desc, [row, k0 + BLOCK_K], next_bar, next_w.slice(half * HALF, HALF))


@gluon.jit
def _rows_of(rows_ptr, start, rows, m):
    """Rows of the hidden states that a tile has at m, -1 past its end."""
    return gl.load(rows_ptr + start + m, mask=m < rows, other=-1)


@gluon.jit
def _gather_step(
    upper_ptrs, lower_ptrs, upper, lower, rows, k0, b, c, bar, WARP: gl.constexpr, LOWER: gl.constexpr
):  # fmt: skip
    """A warp's rows of a step, into a slot."""
    OWN: gl.constexpr = upper.shape[0]
    to = b.slice(WARP * OWN, OWN)
    async_copy.async_copy_global_to_shared(to, upper_ptrs + k0, mask=gl.expand_dims(upper >= 0, 1))
    if LOWER and rows > UPPER:
        lower_to = c.slice(WARP * lower.shape[0], lower.shape[0])
        async_copy.async_copy_global_to_shared(lower_to, lower_ptrs + k0, mask=gl.expand_dims(lower >= 0, 1))
    async_copy.mbarrier_arrive(bar, increment_count=False)


@gluon.jit
def _gather(
    WARP: gl.constexpr, x, x_stride, w_desc, rows_ptr, tiles_ptr, num_tiles_ptr, depth, columns,
    a, b, c, full, empty, LOWER: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """A producer of gate/up, one warp: a quarter of the rows, and the first one the weights."""
    STAGES: gl.constexpr = a.shape[0]
    OWN: gl.constexpr = UPPER // GATHERERS
    OWN_LOWER: gl.constexpr = LOWER // GATHERERS if LOWER else 1
    n_blocks = gl.cdiv(columns, HALF)
    total = gl.load(num_tiles_ptr) * n_blocks
    stride = gl.num_programs(0)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])  # 16 bytes of a thread
    m = WARP * OWN + gl.arange(0, OWN, gl.SliceLayout(1, layout))
    lower_m = UPPER + WARP * OWN_LOWER + gl.arange(0, OWN_LOWER, gl.SliceLayout(1, layout))
    k = gl.expand_dims(gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout)), 0)
    slot = 0
    parity = 1
    expert, start, rows, block_n = locate(gl.program_id(0), total, tiles_ptr, n_blocks, GROUP_M)
    upper = _rows_of(rows_ptr, start, rows, m)
    lower = _rows_of(rows_ptr, start, rows, lower_m)
    for index in range(gl.program_id(0), total, stride):
        # early, so that the next item's loads are not waited for
        next_expert, next_start, next_rows, next_block_n = locate(
            index + stride, total, tiles_ptr, n_blocks, GROUP_M
        )  # fmt: skip
        next_upper = _rows_of(rows_ptr, next_start, next_rows, m)
        next_lower = _rows_of(rows_ptr, next_start, next_rows, lower_m)
        upper_ptrs = x + gl.expand_dims(gl.maximum(upper, 0).to(gl.int64) * x_stride, 1) + k
        lower_ptrs = x + gl.expand_dims(gl.maximum(lower, 0).to(gl.int64) * x_stride, 1) + k
        w_row = expert * 2 * columns + block_n * HALF
        for k0 in range(0, depth, 2 * BLOCK_K):
            next_slot, next_parity = following(slot, parity, STAGES)
            mbarrier.wait(empty.index(slot), parity)
            mbarrier.wait(empty.index(next_slot), next_parity)
            bar = full.index(slot)
            next_bar = full.index(next_slot)
            if WARP == 0:
                mbarrier.expect(bar, 2 * HALF * BLOCK_K * 2)
                mbarrier.expect(next_bar, 2 * HALF * BLOCK_K * 2)
                _load_weights(w_desc, w_row, columns, k0, bar, next_bar, a.index(slot), a.index(next_slot))
            _gather_step(
                upper_ptrs, lower_ptrs, upper, lower, rows, k0, b.index(slot), c.index(slot), bar, WARP, LOWER
            )  # fmt: skip
            _gather_step(
                upper_ptrs, lower_ptrs, upper, lower, rows, k0 + BLOCK_K,
                b.index(next_slot), c.index(next_slot), next_bar, WARP, LOWER,
            )  # fmt: skip
            slot, parity = following(next_slot, next_parity, STAGES)
        expert, start, rows, block_n = next_expert, next_start, next_rows, next_block_n
        upper = next_upper
        lower = next_lower


@gluon.jit
def _expect(bar, boxes, BOXES: gl.constexpr):
    """The weights of a step, and of up to BOXES boxes of rows as many as there are."""
    for box in gl.static_range(BOXES):
        mbarrier.expect(bar, (2 * HALF + (box + 1) * BOX) * BLOCK_K * 2, pred=boxes == box + 1)


@gluon.jit
def _load_rows(x_desc, start, k0, boxes, b, c, bar, LOWER: gl.constexpr):
    """A step's. Rows past the tile belong to others, or are left from before: their products are not stored."""
    for box in gl.static_range((UPPER + LOWER) // BOX):
        to = b.slice(box * BOX, BOX) if box * BOX < UPPER else c.slice(box * BOX - UPPER, BOX)
        tma.async_copy_global_to_shared(x_desc, [start + box * BOX, k0], bar, to, pred=box < boxes)


@gluon.jit
def _load(
    x_desc, w_desc, tiles_ptr, num_tiles_ptr, depth, columns, a, b, c, full, empty,
    LOWER: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """The producer of down, one warp."""
    STAGES: gl.constexpr = a.shape[0]
    BOXES: gl.constexpr = (UPPER + LOWER) // BOX
    n_blocks = gl.cdiv(columns, 2 * HALF)
    total = gl.load(num_tiles_ptr) * n_blocks
    slot = 0
    parity = 1
    for index in range(gl.program_id(0), total, gl.num_programs(0)):
        expert, start, rows, block_n = locate(index, total, tiles_ptr, n_blocks, GROUP_M)
        w_row = expert * columns + block_n * (2 * HALF)
        boxes = gl.cdiv(rows, BOX)
        for k0 in range(0, depth, 2 * BLOCK_K):
            next_slot, next_parity = following(slot, parity, STAGES)
            mbarrier.wait(empty.index(slot), parity)
            mbarrier.wait(empty.index(next_slot), next_parity)
            bar = full.index(slot)
            next_bar = full.index(next_slot)
            _expect(bar, boxes, BOXES)
            _expect(next_bar, boxes, BOXES)
            _load_weights(w_desc, w_row, HALF, k0, bar, next_bar, a.index(slot), a.index(next_slot))
            _load_rows(x_desc, start, k0, boxes, b.index(slot), c.index(slot), bar, LOWER)
            _load_rows(x_desc, start, k0 + BLOCK_K, boxes, b.index(next_slot), c.index(next_slot), next_bar, LOWER)
            slot, parity = following(next_slot, next_parity, STAGES)


@gluon.jit
def _zeros(N: gl.constexpr):
    return gl.zeros((64, N), gl.float32, accumulator_layout(N))


@gluon.jit
def _targets(start, rows, target_ptr, FIRST: gl.constexpr, N: gl.constexpr, GATE_UP: gl.constexpr):
    """Where results of N tile rows from FIRST on go."""
    m = FIRST + gl.arange(0, N, gl.SliceLayout(1, store_layout(N)))
    target = start + m
    if not GATE_UP:
        target = gl.load(target_ptr + target, mask=m < rows, other=0)
    return target


@gluon.jit
def _store(result, FIRST: gl.constexpr, column, target, rows, columns, out_ptr, out_stride):
    """64 columns of the tile rows from FIRST on."""
    layout: gl.constexpr = store_layout(result.shape[1])
    result = gl.convert_layout(result.to(out_ptr.dtype.element_ty).permute((1, 0)), layout)
    m = FIRST + gl.arange(0, result.shape[0], gl.SliceLayout(1, layout))
    n = column + gl.arange(0, 64, gl.SliceLayout(0, layout))
    out_ptrs = out_ptr + gl.expand_dims(target.to(gl.int64) * out_stride, 1) + gl.expand_dims(n, 0)
    gl.store(out_ptrs, result, mask=gl.expand_dims(m < rows, 1) & gl.expand_dims(n < columns, 0))


@gluon.jit
def _finish(
    first, second, FIRST: gl.constexpr, column, expert, target, rows, columns, bias_ptr, out_ptr, out_stride,
    GATE_UP: gl.constexpr, BIAS: gl.constexpr, LIMIT: gl.constexpr,
):  # fmt: skip
    """Activate, round and store the products of both blocks with tile rows from FIRST on."""
    n = column + gl.arange(0, 64, gl.SliceLayout(1, first.type.layout))
    if GATE_UP:
        act = gated(first, second, bias_ptr, expert, n, columns, True, BIAS, LIMIT)
        _store(act, FIRST, column, target, rows, columns, out_ptr, out_stride)
    else:
        if BIAS:
            first = add_bias(first, bias_ptr + expert * columns, n, n < columns, True)
            second = add_bias(second, bias_ptr + expert * columns, n + HALF, n + HALF < columns, True)
        _store(first, FIRST, column, target, rows, columns, out_ptr, out_stride)
        _store(second, FIRST, column + HALF, target, rows, columns, out_ptr, out_stride)


@gluon.jit
def _item(
    slot, parity, steps, column, expert, start, rows, columns, bias_ptr, out_ptr, out_stride, target_ptr,
    a, b, c, full, empty, FIRST: gl.constexpr, REST: gl.constexpr, CONSUMER: gl.constexpr,
    GATE_UP: gl.constexpr, BIAS: gl.constexpr, LIMIT: gl.constexpr,
):  # fmt: skip
    """An item whose tile has up to FIRST + REST rows. Returns slot and parity after it."""
    SOME: gl.constexpr = REST if REST else 16  # without a REST, what has that size is not used
    first = _zeros(FIRST)
    second = _zeros(FIRST)
    first_rest = _zeros(SOME)
    second_rest = _zeros(SOME)
    target = _targets(start, rows, target_ptr, 0, FIRST, GATE_UP)  # early: it is not waited for
    rest_target = _targets(start, rows, target_ptr, UPPER, SOME, GATE_UP)
    for _ in range(steps):
        mbarrier.wait(full.index(slot), parity)
        if GATE_UP:
            fence_async_shared()  # wgmma does not see by itself what cp.async wrote
        w = a.index(slot).slice(64 * CONSUMER, 64)
        second_w = a.index(slot).slice(HALF + 64 * CONSUMER, 64)
        x = b.index(slot).slice(0, FIRST).permute((1, 0))
        first = warpgroup_mma(w, x, first, is_async=True)
        second = warpgroup_mma(second_w, x, second, is_async=True)
        if REST:
            x = c.index(slot).slice(0, REST).permute((1, 0))
            first_rest = warpgroup_mma(w, x, first_rest, is_async=True)
            second_rest = warpgroup_mma(second_w, x, second_rest, is_async=True)
            first, second, first_rest, second_rest = warpgroup_mma_wait(
                0, deps=[first, second, first_rest, second_rest]
            )  # fmt: skip
        else:
            first, second = warpgroup_mma_wait(0, deps=[first, second])
        mbarrier.arrive(empty.index(slot))
        slot, parity = following(slot, parity, a.shape[0])
    _finish(
        first, second, 0, column, expert, target, rows, columns, bias_ptr, out_ptr, out_stride, GATE_UP, BIAS, LIMIT
    )  # fmt: skip
    if REST:
        _finish(
            first_rest, second_rest, UPPER, column, expert, rest_target, rows, columns,
            bias_ptr, out_ptr, out_stride, GATE_UP, BIAS, LIMIT,
        )  # fmt: skip
    return slot, parity


@gluon.jit
def _multiply(
    CONSUMER: gl.constexpr, bias_ptr, out_ptr, out_stride, target_ptr, tiles_ptr, num_tiles_ptr, depth, columns,
    a, b, c, full, empty, LOWER: gl.constexpr, GATE_UP: gl.constexpr, GROUP_M: gl.constexpr,
    BIAS: gl.constexpr, LIMIT: gl.constexpr, OUT_AT: gl.constexpr,
):  # fmt: skip
    """Consumer 0 or 1: the first or the second 64 of each 128 weight rows."""
    HEIGHTS: gl.constexpr = heights(LOWER)
    BLOCK_N: gl.constexpr = HALF if GATE_UP else 2 * HALF
    if OUT_AT:
        out_ptr = gl.multiple_of(gl.load(out_ptr).to(gl.pointer_type(gl.bfloat16)), 16)
    n_blocks = gl.cdiv(columns, BLOCK_N)
    total = gl.load(num_tiles_ptr) * n_blocks
    steps = depth // BLOCK_K
    begin = gl.program_id(0)
    slot = 0
    parity = 0
    expert, start, rows, block_n = locate(begin, total, tiles_ptr, n_blocks, GROUP_M)
    for index in range(begin, total, gl.num_programs(0)):
        # early, so that the next item's loads are not waited for
        next_expert, next_start, next_rows, next_block_n = locate(
            index + gl.num_programs(0), total, tiles_ptr, n_blocks, GROUP_M
        )  # fmt: skip
        column = block_n * BLOCK_N + CONSUMER * 64
        lower = 0
        for height in gl.static_range(len(HEIGHTS)):
            if (rows > lower) & (rows <= HEIGHTS[height][0] + HEIGHTS[height][1]):
                slot, parity = _item(
                    slot, parity, steps, column, expert, start, rows, columns, bias_ptr, out_ptr, out_stride,
                    target_ptr, a, b, c, full, empty, HEIGHTS[height][0], HEIGHTS[height][1], CONSUMER,
                    GATE_UP, BIAS, LIMIT,
                )  # fmt: skip
            lower = HEIGHTS[height][0] + HEIGHTS[height][1]
        expert, start, rows, block_n = next_expert, next_start, next_rows, next_block_n


@gluon.jit
def dense_tiles_kernel(
    x, x_stride, w_desc, bias_ptr, out_ptr, out_stride, index_ptr, tiles_ptr, num_tiles_ptr, depth, columns,
    LOWER: gl.constexpr, STAGES: gl.constexpr, GATE_UP: gl.constexpr, GROUP_M: gl.constexpr,
    BIAS: gl.constexpr, LIMIT: gl.constexpr, OUT_AT: gl.constexpr,
):  # fmt: skip
    """GATE_UP: `gate_up_kernel` of `triton_grouped_gemm`, else `down_kernel`.

    x: with GATE_UP a pointer to the hidden states, of which index_ptr says the row of each position; else a descriptor
    of the activations, the results of which go to the rows that index_ptr says. LOWER: rows of a tile
    after the first UPPER, 0 or 32. depth: a multiple of two steps.
    """
    a = gl.allocate_shared_memory(w_desc.dtype, [STAGES, 2 * HALF, BLOCK_K], SHARED)
    b = gl.allocate_shared_memory(w_desc.dtype, [STAGES, UPPER, BLOCK_K], SHARED)
    if LOWER:
        c = gl.allocate_shared_memory(w_desc.dtype, [STAGES, LOWER, BLOCK_K], SHARED)
    else:
        c = b
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + 32 * GATHERERS if GATE_UP else 1)  # TMA, and each gathering thread
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    gl.thread_barrier()
    if GATE_UP:
        gl.warp_specialize(
            [
                (_multiply, (0, bias_ptr, out_ptr, out_stride, index_ptr, tiles_ptr, num_tiles_ptr, depth, columns,
                             a, b, c, full, empty, LOWER, True, GROUP_M, BIAS, LIMIT, OUT_AT)),
                (_multiply, (1, bias_ptr, out_ptr, out_stride, index_ptr, tiles_ptr, num_tiles_ptr, depth, columns,
                             a, b, c, full, empty, LOWER, True, GROUP_M, BIAS, LIMIT, OUT_AT)),
                (_gather, (0, x, x_stride, w_desc, index_ptr, tiles_ptr, num_tiles_ptr, depth, columns,
                           a, b, c, full, empty, LOWER, GROUP_M)),
                (_gather, (1, x, x_stride, w_desc, index_ptr, tiles_ptr, num_tiles_ptr, depth, columns,
                           a, b, c, full, empty, LOWER, GROUP_M)),
                (_gather, (2, x, x_stride, w_desc, index_ptr, tiles_ptr, num_tiles_ptr, depth, columns,
                           a, b, c, full, empty, LOWER, GROUP_M)),
                (_gather, (3, x, x_stride, w_desc, index_ptr, tiles_ptr, num_tiles_ptr, depth, columns,
                           a, b, c, full, empty, LOWER, GROUP_M)),
            ],
            [4, 1, 1, 1, 1],
            [208, 72, 72, 72, 72],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_multiply, (0, bias_ptr, out_ptr, out_stride, index_ptr, tiles_ptr, num_tiles_ptr, depth, columns,
                             a, b, c, full, empty, LOWER, False, GROUP_M, BIAS, LIMIT, OUT_AT)),
                (_multiply, (1, bias_ptr, out_ptr, out_stride, index_ptr, tiles_ptr, num_tiles_ptr, depth, columns,
                             a, b, c, full, empty, LOWER, False, GROUP_M, BIAS, LIMIT, OUT_AT)),
                (_load, (x, w_desc, tiles_ptr, num_tiles_ptr, depth, columns, a, b, c, full, empty,
                         LOWER, GROUP_M)),
            ],
            [4, 1],
            [216, 64],
        )  # fmt: skip


def gate_up(
    x: torch.Tensor, w13: torch.Tensor, bias: torch.Tensor | None, limit: float, activations: torch.Tensor,
    grouping: Grouping, tiling: DenseTiling, programs: int,
) -> None:  # fmt: skip
    """The first product of `GroupedExperts.ffn`; bias: [experts, 2 * intermediate]."""
    x = aligned(x)
    _launch(
        x, x.stride(0), w13, bias, activations, activations.stride(0), grouping.rows, grouping, tiling, programs,
        GATE_UP=True, LIMIT=limit, OUT_AT=False,
    )  # fmt: skip


def down(
    activations: torch.Tensor, w2: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor,
    grouping: Grouping, tiling: DenseTiling, programs: int,
) -> None:  # fmt: skip
    """The second one; bias: [experts, hidden]."""
    x = TensorDescriptor.from_tensor(activations, [BOX.value, BLOCK_K.value], SHARED.value)
    out_at = out.dtype == torch.int64
    _launch(
        x, 0, w2, bias, out, w2.shape[1] if out_at else out.stride(0), grouping.order, grouping, tiling, programs,
        GATE_UP=False, LIMIT=0.0, OUT_AT=out_at,
    )  # fmt: skip


def _launch(
    x: Any, x_stride: int, w: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, out_stride: int,
    index: torch.Tensor, grouping: Grouping, tiling: DenseTiling, programs: int, *, GATE_UP: bool, **chosen: Any,
) -> None:  # fmt: skip
    columns, depth = w.shape[1] // (2 if GATE_UP else 1), w.shape[2]
    w_desc = TensorDescriptor.from_tensor(w.view(-1, depth), [HALF.value, BLOCK_K.value], SHARED.value)
    items = grouping.max_tiles * triton.cdiv(columns, HALF.value * (1 if GATE_UP else 2))
    dense_tiles_kernel[(min(items, programs),)](
        x, x_stride, w_desc, w if bias is None else bias, out, out_stride, index, grouping.tiles, grouping.num_tiles,
        depth, columns, LOWER=tiling.block_m - UPPER.value, STAGES=tiling.stages, GATE_UP=GATE_UP,
        GROUP_M=tiling.group_m, BIAS=bias is not None, num_warps=4, **chosen,
    )  # fmt: skip
