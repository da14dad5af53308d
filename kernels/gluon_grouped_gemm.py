"""The two grouped GEMMs for more than 76 rows per expert, warp-specialised: in Gluon, for Hopper.

A program has the multiprocessor to itself and strides over work items, a tile of 64 or 128 rows by a block of columns
each:

* warps that load: step after step of K, item after item, into a ring of slots in shared memory, each of which holds
  rows (`a`) and weights (`b`, `more_b`) of one step. Four of them gather the rows of gate/up, each on its own: as one
  group, with barriers between them, they were too slow;
* two groups multiply, in turn (ping-pong). One rounds, activates and stores its item while the other one multiplies:
  the tensor cores wait for no epilogue, which the kernels of `triton_grouped_gemm` cannot hide.

Barriers in shared memory keep them in step. `full` of a slot: its bytes have come. `empty`: its products are done.
`turns` of a consumer: the other one has started all its products. A wait names the parity of what it waits for; waiting
for parity 1 of a new barrier returns at once.

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

from kernels.triton_activation import add_bias, gated
from kernels.triton_grouping import TILE_FIELDS, Grouping
from kernels.triton_tiling import PING_PONG, Tiling

SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16))
"""Of both operands, as TMA writes and wgmma reads them."""
BOX = gl.constexpr(64)
"""Rows that one TMA loads of the activations."""
GATHERERS = gl.constexpr(4)
"""Warps that gather the rows of gate/up."""


def admits(w13: torch.Tensor, w2: torch.Tensor) -> bool:
    """Whether the kernel can multiply by these: compiled, on Hopper, in 16 bits, K a multiple of a step's."""
    return (
        w13.is_cuda
        and not triton.knobs.runtime.interpret
        and torch.cuda.get_device_capability(w13.device) == (9, 0)
        and w13.dtype in (torch.bfloat16, torch.float16)
        and w13.shape[2] % PING_PONG.gate_up.block_k == 0
        and w2.shape[2] % PING_PONG.down.block_k == 0
    )


@gluon.jit
def locate(index, total, tiles_ptr, n_blocks, GROUP_M: gl.constexpr):
    """Expert, first position and rows of a work item's tile, and its block; see `triton_grouped_gemm`.

    Nothing is read for an item past the last one: the list of tiles may be empty.
    """
    exists = index < total
    index = gl.where(exists, index, 0)
    some_tile = tiles_ptr + TILE_FIELDS * (index // n_blocks)  # of the same expert
    first = gl.load(some_tile + 3, mask=exists, other=0)
    tiles = gl.load(some_tile + 4, mask=exists, other=1)
    inside = index - first * n_blocks
    per_group = GROUP_M * n_blocks
    begin = (inside // per_group) * GROUP_M
    height = gl.minimum(tiles - begin, GROUP_M)
    rest = inside % per_group
    entry = tiles_ptr + TILE_FIELDS * (first + begin + rest % height)
    expert = gl.load(entry, mask=exists, other=0)
    start = gl.load(entry + 1, mask=exists, other=0)
    rows = gl.load(entry + 2, mask=exists, other=0)
    return expert, start, rows, rest // height


@gluon.jit
def advance(slot, parity, steps, STAGES: gl.constexpr):
    """Slot and parity so many steps on."""
    slot = slot + steps
    return slot % STAGES, parity ^ ((slot // STAGES) & 1)


@gluon.jit
def following(slot, parity, STAGES: gl.constexpr):
    """Slot and parity one step on."""
    wraps = slot == STAGES - 1
    return gl.where(wraps, 0, slot + 1), gl.where(wraps, parity ^ 1, parity)


@gluon.jit
def _load_weights(w_desc, w_row, columns, k0, bar, b, PARTS: gl.constexpr):
    """A step of the weight rows from w_row on that fill b; half of them are those of up where PARTS is 2."""
    BOX_N: gl.constexpr = w_desc.block_shape[0]
    ROWS: gl.constexpr = b.shape[0] // PARTS
    for part in gl.static_range(PARTS):
        for first in gl.static_range(0, ROWS, BOX_N):
            row = w_row + part * columns + first
            tma.async_copy_global_to_shared(w_desc, [row, k0], bar, b.slice(part * ROWS + first, BOX_N))


@gluon.jit
def _rows_of(rows_ptr, start, rows, m):
    """Rows of the hidden states that a tile has at m, -1 past its end."""
    return gl.load(rows_ptr + start + m, mask=m < rows, other=-1)


@gluon.jit
def _gather(
    WARP: gl.constexpr, x, x_stride, w_desc, rows_ptr, tiles_ptr, num_tiles_ptr, depth, columns,
    a, b, more_b, full, empty, GROUP_M: gl.constexpr, MORE: gl.constexpr, UNROLL: gl.constexpr,
):  # fmt: skip
    """A producer of gate/up, one warp: its rows of every 64, and the first one the weights. UNROLL: steps at once."""
    STAGES: gl.constexpr = a.shape[0]
    BLOCK_M: gl.constexpr = a.shape[1]
    BLOCK_K: gl.constexpr = a.shape[2]
    WIDTH: gl.constexpr = b.shape[1] + MORE
    OWN: gl.constexpr = BOX // GATHERERS
    FIRST: gl.constexpr = WARP * OWN
    n_blocks = gl.cdiv(columns, WIDTH // 2)
    total = gl.load(num_tiles_ptr) * n_blocks
    stride = gl.num_programs(0)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])  # 16 bytes of a thread
    m = FIRST + gl.arange(0, OWN, gl.SliceLayout(1, layout))
    k = gl.expand_dims(gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout)), 0)
    slot = 0
    parity = 1
    expert, start, rows, block_n = locate(gl.program_id(0), total, tiles_ptr, n_blocks, GROUP_M)
    upper = _rows_of(rows_ptr, start, rows, m)
    if BLOCK_M > BOX:
        lower = _rows_of(rows_ptr, start, rows, m + BOX)
    for index in range(gl.program_id(0), total, stride):
        # early, so that the next item's loads are not waited for
        next_expert, next_start, next_rows, next_block_n = locate(
            index + stride, total, tiles_ptr, n_blocks, GROUP_M
        )  # fmt: skip
        next_upper = _rows_of(rows_ptr, next_start, next_rows, m)
        upper_ptrs = x + gl.expand_dims(gl.maximum(upper, 0).to(gl.int64) * x_stride, 1) + k
        if BLOCK_M > BOX:
            next_lower = _rows_of(rows_ptr, next_start, next_rows, m + BOX)
            lower_ptrs = x + gl.expand_dims(gl.maximum(lower, 0).to(gl.int64) * x_stride, 1) + k
        w_row = expert * 2 * columns + block_n * (WIDTH // 2)
        for first_k in range(0, depth, UNROLL * BLOCK_K):
            for step in gl.static_range(UNROLL):  # whose copies share addresses, with constants added
                k0 = first_k + step * BLOCK_K
                mbarrier.wait(empty.index(slot), parity)
                bar = full.index(slot)
                if WARP == 0:
                    mbarrier.expect(bar, WIDTH * BLOCK_K * 2)
                    _load_weights(w_desc, w_row, columns, k0, bar, b.index(slot), 2)
                    if MORE:
                        _load_weights(w_desc, w_row + b.shape[1] // 2, columns, k0, bar, more_b.index(slot), 2)
                to = a.index(slot).slice(FIRST, OWN)
                async_copy.async_copy_global_to_shared(to, upper_ptrs + k0, mask=gl.expand_dims(upper >= 0, 1))
                if BLOCK_M > BOX:
                    to = a.index(slot).slice(BOX + FIRST, OWN)
                    async_copy.async_copy_global_to_shared(to, lower_ptrs + k0, mask=gl.expand_dims(lower >= 0, 1))
                async_copy.mbarrier_arrive(bar, increment_count=False)
                slot, parity = following(slot, parity, STAGES)
        expert, start, rows, block_n, upper = next_expert, next_start, next_rows, next_block_n, next_upper
        if BLOCK_M > BOX:
            lower = next_lower


@gluon.jit
def _load(
    x_desc, w_desc, tiles_ptr, num_tiles_ptr, depth, columns, a, b, full, empty, GROUP_M: gl.constexpr
):  # fmt: skip
    """The producer of down, one warp. It finds an item when the one before has been loaded: the more the programs'
    items drift apart, the less L2 shares between them, and with many rows per expert down was slower."""
    STAGES: gl.constexpr = a.shape[0]
    BLOCK_M: gl.constexpr = a.shape[1]
    BLOCK_K: gl.constexpr = a.shape[2]
    BLOCK_N: gl.constexpr = b.shape[1]
    n_blocks = gl.cdiv(columns, BLOCK_N)
    total = gl.load(num_tiles_ptr) * n_blocks
    slot = 0
    parity = 1
    for index in range(gl.program_id(0), total, gl.num_programs(0)):
        expert, start, rows, block_n = locate(index, total, tiles_ptr, n_blocks, GROUP_M)
        w_row = expert * columns + block_n * BLOCK_N
        boxes = gl.cdiv(rows, BOX)
        for k0 in range(0, depth, BLOCK_K):
            mbarrier.wait(empty.index(slot), parity)
            bar = full.index(slot)
            # rows past the tile belong to others, or are left from before: their products are not stored
            for box in gl.static_range(BLOCK_M // BOX):
                mbarrier.expect(bar, (BLOCK_N + (box + 1) * BOX) * BLOCK_K * 2, pred=boxes == box + 1)
            for box in gl.static_range(BLOCK_M // BOX):
                to = a.index(slot).slice(box * BOX, BOX)
                tma.async_copy_global_to_shared(x_desc, [start + box * BOX, k0], bar, to, pred=box < boxes)
            _load_weights(w_desc, w_row, columns, k0, bar, b.index(slot), 1)
            slot, parity = following(slot, parity, STAGES)


@gluon.jit
def _finish(
    acc, column, expert, target, live, columns, bias_ptr, out_ptr, out_stride,
    GATE_UP: gl.constexpr, BIAS: gl.constexpr, LIMIT: gl.constexpr,
):  # fmt: skip
    """Activate, round and store the products of a tile with one operand; target: the row of each of its rows."""
    M: gl.constexpr = acc.shape[0]
    N: gl.constexpr = acc.shape[1] // 2 if GATE_UP else acc.shape[1]
    STORE: gl.constexpr = store_layout(M, N)
    if GATE_UP:
        gate, up = acc.reshape([M, 2, N]).permute([0, 2, 1]).split()
        n = column + gl.arange(0, N, gl.SliceLayout(0, gate.type.layout))
        result = gated(gate, up, bias_ptr, expert, n, columns, False, BIAS, LIMIT)
    else:
        n = column + gl.arange(0, N, gl.SliceLayout(0, acc.type.layout))
        result = add_bias(acc, bias_ptr + expert * columns, n, n < columns, False) if BIAS else acc
    result = gl.convert_layout(result.to(out_ptr.dtype.element_ty), STORE)
    n = column + gl.arange(0, N, gl.SliceLayout(0, STORE))
    out_ptrs = out_ptr + gl.expand_dims(target.to(gl.int64) * out_stride, 1) + gl.expand_dims(n, 0)
    gl.store(out_ptrs, result, mask=gl.expand_dims(live, 1) & gl.expand_dims(n < columns, 0))


@gluon.jit
def _products(
    slot, parity, steps, a, b, more_b, full, empty, next_turn,
    GATE_UP: gl.constexpr, MORE: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """Those of one item with both operands (twice the first where there is no other), and slot and parity after it."""
    STAGES: gl.constexpr = a.shape[0]
    BLOCK_M: gl.constexpr = a.shape[1]
    N: gl.constexpr = b.shape[1]
    acc = gl.zeros((BLOCK_M, N), gl.float32, accumulator_layout(N))
    if MORE:
        more = gl.zeros((BLOCK_M, MORE), gl.float32, accumulator_layout(MORE))
    if AHEAD:
        mbarrier.wait(full.index(slot), parity)
        fence_async_shared()
    for step in range(steps):
        if not AHEAD:
            mbarrier.wait(full.index(slot), parity)
            if GATE_UP:
                fence_async_shared()  # wgmma does not see by itself what cp.async wrote
        x = a.index(slot)
        acc = warpgroup_mma(x, b.index(slot).permute((1, 0)), acc, is_async=True)
        next_slot, next_parity = following(slot, parity, STAGES)
        if AHEAD:
            mbarrier.wait(full.index(next_slot), next_parity, pred=step + 1 < steps)
            fence_async_shared()
        if MORE:
            more = warpgroup_mma(x, more_b.index(slot).permute((1, 0)), more, is_async=True)
            acc, more = warpgroup_mma_wait(2, deps=[acc, more])
        else:
            acc = warpgroup_mma_wait(1, deps=[acc])
        # the step before has been multiplied
        mbarrier.arrive(empty.index(gl.where(slot == 0, STAGES - 1, slot - 1)), pred=step > 0)
        slot, parity = next_slot, next_parity
    mbarrier.arrive(next_turn)
    if MORE:
        acc, more = warpgroup_mma_wait(0, deps=[acc, more])
    else:
        acc = warpgroup_mma_wait(0, deps=[acc])
        more = acc
    mbarrier.arrive(empty.index(gl.where(slot == 0, STAGES - 1, slot - 1)))
    return acc, more, slot, parity


@gluon.jit
def _multiply(
    CONSUMER: gl.constexpr, bias_ptr, out_ptr, out_stride, target_ptr, tiles_ptr, num_tiles_ptr, depth, columns,
    a, b, more_b, full, empty, turns,
    GATE_UP: gl.constexpr, GROUP_M: gl.constexpr, MORE: gl.constexpr, AHEAD: gl.constexpr,
    BIAS: gl.constexpr, LIMIT: gl.constexpr, OUT_AT: gl.constexpr,
):  # fmt: skip
    """Consumer 0 or 1, which takes every second item."""
    STAGES: gl.constexpr = a.shape[0]
    BLOCK_M: gl.constexpr = a.shape[1]
    N: gl.constexpr = b.shape[1]
    PARTS: gl.constexpr = 2 if GATE_UP else 1
    BLOCK_N: gl.constexpr = (N + MORE) // PARTS
    if OUT_AT:
        out_ptr = gl.multiple_of(gl.load(out_ptr).to(gl.pointer_type(gl.bfloat16)), 16)
    n_blocks = gl.cdiv(columns, BLOCK_N)
    total = gl.load(num_tiles_ptr) * n_blocks
    steps = gl.cdiv(depth, a.shape[2])
    stride = 2 * gl.num_programs(0)
    begin = gl.program_id(0) + CONSUMER * gl.num_programs(0)
    slot, parity = advance(0, 0, CONSUMER * steps, STAGES)
    turn = 1 - CONSUMER  # consumer 0 begins
    m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, store_layout(BLOCK_M, N // PARTS)))
    if MORE:
        more_m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, store_layout(BLOCK_M, MORE // PARTS)))
    expert, start, rows, block_n = locate(begin, total, tiles_ptr, n_blocks, GROUP_M)
    for index in range(begin, total, stride):
        # early, so that the next item's loads are not waited for
        next_expert, next_start, next_rows, next_block_n = locate(
            index + stride, total, tiles_ptr, n_blocks, GROUP_M
        )  # fmt: skip
        live = m < rows
        target = start + m
        if not GATE_UP:
            target = gl.load(target_ptr + target, mask=live, other=0)
        mbarrier.wait(turns.index(CONSUMER), turn)
        acc, more, slot, parity = _products(
            slot, parity, steps, a, b, more_b, full, empty, turns.index(1 - CONSUMER), GATE_UP, MORE, AHEAD
        )  # fmt: skip
        column = block_n * BLOCK_N
        _finish(acc, column, expert, target, live, columns, bias_ptr, out_ptr, out_stride, GATE_UP, BIAS, LIMIT)
        if MORE:
            _finish(
                more, column + N // PARTS, expert, start + more_m, more_m < rows, columns,
                bias_ptr, out_ptr, out_stride, GATE_UP, BIAS, LIMIT,
            )  # fmt: skip
        turn ^= 1
        slot, parity = advance(slot, parity, steps, STAGES)  # past the other consumer's item
        expert, start, rows, block_n = next_expert, next_start, next_rows, next_block_n


@gluon.jit
def ping_pong_kernel(
    x, x_stride, w_desc, bias_ptr, out_ptr, out_stride, index_ptr, tiles_ptr, num_tiles_ptr, depth, columns,
    BLOCK_M: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr, GATE_UP: gl.constexpr, GROUP_M: gl.constexpr,
    UNROLL: gl.constexpr, AHEAD: gl.constexpr, BIAS: gl.constexpr, LIMIT: gl.constexpr, OUT_AT: gl.constexpr,
):  # fmt: skip
    """GATE_UP: `gate_up_kernel` of `triton_grouped_gemm`, else `down_kernel`.

    x: with GATE_UP a pointer to the hidden states, of which index_ptr says the row of each position; else a descriptor
    of the activations, the results of which go to the rows that index_ptr says. WIDTH: weight rows of a block, with
    GATE_UP half of them of up; 192 are two operands, of 128 and 64, since sizes in Triton are powers of two (with
    GATE_UP alone). UNROLL: with GATE_UP, divides the number of steps. AHEAD: see `Tiling`.
    """
    BLOCK_K: gl.constexpr = w_desc.block_shape[1]
    MORE: gl.constexpr = WIDTH % 128
    a = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], SHARED)
    b = gl.allocate_shared_memory(w_desc.dtype, [STAGES, WIDTH - MORE, BLOCK_K], SHARED)
    if MORE:
        more_b = gl.allocate_shared_memory(w_desc.dtype, [STAGES, MORE, BLOCK_K], SHARED)
    else:
        more_b = b
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + 32 * GATHERERS if GATE_UP else 1)  # TMA, and each gathering thread
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    if GATE_UP:
        gl.warp_specialize(
            [
                (_multiply, (0, bias_ptr, out_ptr, out_stride, index_ptr, tiles_ptr, num_tiles_ptr, depth, columns,
                             a, b, more_b, full, empty, turns, True, GROUP_M, MORE, AHEAD, BIAS, LIMIT, OUT_AT)),
                (_multiply, (1, bias_ptr, out_ptr, out_stride, index_ptr, tiles_ptr, num_tiles_ptr, depth, columns,
                             a, b, more_b, full, empty, turns, True, GROUP_M, MORE, AHEAD, BIAS, LIMIT, OUT_AT)),
                (_gather, (0, x, x_stride, w_desc, index_ptr, tiles_ptr, num_tiles_ptr, depth, columns,
                           a, b, more_b, full, empty, GROUP_M, MORE, UNROLL)),
                (_gather, (1, x, x_stride, w_desc, index_ptr, tiles_ptr, num_tiles_ptr, depth, columns,
                           a, b, more_b, full, empty, GROUP_M, MORE, UNROLL)),
                (_gather, (2, x, x_stride, w_desc, index_ptr, tiles_ptr, num_tiles_ptr, depth, columns,
                           a, b, more_b, full, empty, GROUP_M, MORE, UNROLL)),
                (_gather, (3, x, x_stride, w_desc, index_ptr, tiles_ptr, num_tiles_ptr, depth, columns,
                           a, b, more_b, full, empty, GROUP_M, MORE, UNROLL)),
            ],
            [4, 1, 1, 1, 1],
            # registers of a thread of all but the first: with fewer, each copy waits for the address of the one before
            [224, 56, 56, 56, 56],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_multiply, (0, bias_ptr, out_ptr, out_stride, index_ptr, tiles_ptr, num_tiles_ptr, depth, columns,
                             a, b, more_b, full, empty, turns, False, GROUP_M, MORE, False, BIAS, LIMIT, OUT_AT)),
                (_multiply, (1, bias_ptr, out_ptr, out_stride, index_ptr, tiles_ptr, num_tiles_ptr, depth, columns,
                             a, b, more_b, full, empty, turns, False, GROUP_M, MORE, False, BIAS, LIMIT, OUT_AT)),
                (_load, (x, w_desc, tiles_ptr, num_tiles_ptr, depth, columns, a, b, full, empty, GROUP_M)),
            ],
            [4, 1],
            [232, 40],
        )  # fmt: skip


def aligned(x: torch.Tensor) -> torch.Tensor:
    """`x`, or a copy of it whose rows cp.async can move, 16 bytes at a time."""
    if x.data_ptr() % 16 or x.stride(0) % 16:
        return x.clone(memory_format=torch.contiguous_format)
    return x


def gate_up(
    x: torch.Tensor, w13: torch.Tensor, bias: torch.Tensor | None, limit: float, activations: torch.Tensor,
    grouping: Grouping, cut: Tiling, programs: int,
) -> None:  # fmt: skip
    """The first product of `GroupedExperts.ffn`; bias: [experts, 2 * intermediate]."""
    x = aligned(x)
    _launch(
        x, x.stride(0), w13, bias, activations, activations.stride(0), grouping.rows, grouping, cut, programs,
        GATE_UP=True, LIMIT=limit, OUT_AT=False,
    )  # fmt: skip


def down(
    activations: torch.Tensor, w2: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor,
    grouping: Grouping, cut: Tiling, programs: int,
) -> None:  # fmt: skip
    """The second one; bias: [experts, hidden]."""
    x = TensorDescriptor.from_tensor(activations, [BOX.value, cut.block_k], SHARED.value)
    out_at = out.dtype == torch.int64
    _launch(
        x, 0, w2, bias, out, w2.shape[1] if out_at else out.stride(0), grouping.order, grouping, cut, programs,
        GATE_UP=False, LIMIT=0.0, OUT_AT=out_at,
    )  # fmt: skip


def _launch(
    x: Any, x_stride: int, w: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, out_stride: int,
    index: torch.Tensor, grouping: Grouping, cut: Tiling, programs: int, *, GATE_UP: bool, **chosen: Any,
) -> None:  # fmt: skip
    parts = 2 if GATE_UP else 1
    columns, depth = w.shape[1] // parts, w.shape[2]
    w_desc = TensorDescriptor.from_tensor(w.view(-1, depth), [weight_box(cut.block_n), cut.block_k], SHARED.value)
    items = grouping.max_tiles * triton.cdiv(columns, cut.block_n)
    ping_pong_kernel[(min(items, programs),)](
        x, x_stride, w_desc, w if bias is None else bias, out, out_stride, index, grouping.tiles, grouping.num_tiles,
        depth, columns, BLOCK_M=grouping.block_m, WIDTH=parts * cut.block_n, STAGES=cut.stages, GATE_UP=GATE_UP,
        GROUP_M=cut.group_m, UNROLL=1 + (depth % (2 * cut.block_k) == 0), AHEAD=cut.ahead, BIAS=bias is not None,
        num_warps=4, **chosen,
    )  # fmt: skip


def weight_box(block_n: int) -> int:
    """Weight rows that one TMA loads: as many as fit into each operand."""
    return block_n & -block_n


@gluon.constexpr_function
def accumulator_layout(columns):
    """Of a tile's products with one operand."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def store_layout(rows, columns):
    """Of a result in registers: a warp keeps the rows that it multiplied, a thread stores 16 bytes at a time."""
    further = [[0, 32 << i] for i in range((columns // 32).bit_length() - 1)] + [[64, 0]] * (rows // 128)
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0], *further],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[rows, columns],
    )
