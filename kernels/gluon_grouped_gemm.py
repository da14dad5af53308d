"""The two grouped GEMMs for a few hundred rows per expert, warp-specialised: in Gluon, for Hopper.

A program has the multiprocessor to itself and strides over work items, a tile of 64 rows by a block of columns each:

* one group of warps loads: step after step of K, item after item, into a ring of slots in shared memory, each of which
  holds rows (`a`) and weights (`b`) of one step;
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
def _load(
    x, x_stride, w_desc, rows_ptr, tiles_ptr, num_tiles_ptr, depth, columns, a, b, full, empty,
    GATE_UP: gl.constexpr, GROUP_M: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The producer."""
    STAGES: gl.constexpr = a.shape[0]
    BLOCK_M: gl.constexpr = a.shape[1]
    BLOCK_K: gl.constexpr = a.shape[2]
    BLOCK_N: gl.constexpr = b.shape[1] // 2 if GATE_UP else b.shape[1]
    n_blocks = gl.cdiv(columns, BLOCK_N)
    total = gl.load(num_tiles_ptr) * n_blocks
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])  # 16 bytes of a thread
    m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
    k = gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))
    slot = 0
    parity = 1
    for index in range(gl.program_id(0), total, gl.num_programs(0)):
        expert, start, rows, block_n = locate(index, total, tiles_ptr, n_blocks, GROUP_M)
        if GATE_UP:
            w_row = expert * 2 * columns + block_n * BLOCK_N
            live = m < rows
            row = gl.load(rows_ptr + start + m, mask=live, other=0)
            x_ptrs = x + gl.expand_dims(row.to(gl.int64) * x_stride, 1) + gl.expand_dims(k, 0)
        else:
            w_row = expert * columns + block_n * BLOCK_N
        for k0 in range(0, depth, BLOCK_K):
            mbarrier.wait(empty.index(slot), parity)
            bar = full.index(slot)
            weights = b.index(slot)
            if GATE_UP:
                mbarrier.expect(bar, 2 * BLOCK_N * BLOCK_K * 2)
                tma.async_copy_global_to_shared(w_desc, [w_row, k0], bar, weights.slice(0, BLOCK_N))
                tma.async_copy_global_to_shared(w_desc, [w_row + columns, k0], bar, weights.slice(BLOCK_N, BLOCK_N))
                async_copy.async_copy_global_to_shared(a.index(slot), x_ptrs + k0, mask=gl.expand_dims(live, 1))
                async_copy.mbarrier_arrive(bar, increment_count=False)
            else:  # rows past the tile belong to others: they are read, and their products not stored
                mbarrier.expect(bar, (BLOCK_M + BLOCK_N) * BLOCK_K * 2)
                tma.async_copy_global_to_shared(x, [start, k0], bar, a.index(slot))
                tma.async_copy_global_to_shared(w_desc, [w_row, k0], bar, weights)
            slot, parity = advance(slot, parity, 1, STAGES)


@gluon.jit
def _multiply(
    CONSUMER: gl.constexpr, bias_ptr, out_ptr, out_stride, target_ptr, tiles_ptr, num_tiles_ptr, depth, columns,
    a, b, full, empty, turns,
    GATE_UP: gl.constexpr, GROUP_M: gl.constexpr, STORE: gl.constexpr,
    BIAS: gl.constexpr, LIMIT: gl.constexpr, OUT_AT: gl.constexpr,
):  # fmt: skip
    """Consumer 0 or 1, which takes every second item."""
    STAGES: gl.constexpr = a.shape[0]
    BLOCK_M: gl.constexpr = a.shape[1]
    WIDTH: gl.constexpr = b.shape[1]
    BLOCK_N: gl.constexpr = WIDTH // 2 if GATE_UP else WIDTH
    if OUT_AT:
        out_ptr = gl.multiple_of(gl.load(out_ptr).to(gl.pointer_type(gl.bfloat16)), 16)
    n_blocks = gl.cdiv(columns, BLOCK_N)
    total = gl.load(num_tiles_ptr) * n_blocks
    steps = gl.cdiv(depth, a.shape[2])
    stride = 2 * gl.num_programs(0)
    begin = gl.program_id(0) + CONSUMER * gl.num_programs(0)
    slot, parity = advance(0, 0, CONSUMER * steps, STAGES)
    turn = 1 - CONSUMER  # consumer 0 begins
    m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, STORE))
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
        acc = gl.zeros((BLOCK_M, WIDTH), gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16]))
        for step in range(steps):
            mbarrier.wait(full.index(slot), parity)
            if GATE_UP:
                fence_async_shared()  # wgmma does not see by itself what cp.async wrote
            acc = warpgroup_mma(a.index(slot), b.index(slot).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])  # the step before has been multiplied
            mbarrier.arrive(empty.index((slot + STAGES - 1) % STAGES), pred=step > 0)
            slot, parity = advance(slot, parity, 1, STAGES)
        mbarrier.arrive(turns.index(1 - CONSUMER))
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((slot + STAGES - 1) % STAGES))
        if GATE_UP:
            gate, up = acc.reshape([BLOCK_M, 2, BLOCK_N]).permute([0, 2, 1]).split()
            n = block_n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, gate.type.layout))
            result = gated(gate, up, bias_ptr, expert, n, columns, False, BIAS, LIMIT)
        else:
            n = block_n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, acc.type.layout))
            result = add_bias(acc, bias_ptr + expert * columns, n, n < columns, False) if BIAS else acc
        result = gl.convert_layout(result.to(out_ptr.dtype.element_ty), STORE)
        n = block_n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, STORE))
        out_ptrs = out_ptr + gl.expand_dims(target.to(gl.int64) * out_stride, 1) + gl.expand_dims(n, 0)
        gl.store(out_ptrs, result, mask=gl.expand_dims(live, 1) & gl.expand_dims(n < columns, 0))
        turn ^= 1
        slot, parity = advance(slot, parity, steps, STAGES)  # past the other consumer's item
        expert, start, rows, block_n = next_expert, next_start, next_rows, next_block_n


@gluon.jit
def ping_pong_kernel(
    x, x_stride, w_desc, bias_ptr, out_ptr, out_stride, index_ptr, tiles_ptr, num_tiles_ptr, depth, columns,
    GATE_UP: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr, STORE: gl.constexpr,
    BIAS: gl.constexpr, LIMIT: gl.constexpr, OUT_AT: gl.constexpr,
):  # fmt: skip
    """GATE_UP: `gate_up_kernel` of `triton_grouped_gemm`, else `down_kernel`.

    x: with GATE_UP a pointer to the hidden states, of which index_ptr says the row of each position; else a descriptor
    of the activations, the results of which go to the rows that index_ptr says. STORE: how a result lies in registers.
    """
    BLOCK_M: gl.constexpr = STORE.shape[0]
    WIDTH: gl.constexpr = 2 * STORE.shape[1] if GATE_UP else STORE.shape[1]
    BLOCK_K: gl.constexpr = w_desc.block_shape[1]
    LOAD_WARPS: gl.constexpr = 4 if GATE_UP else 1  # to gather takes more than to start a TMA
    a = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], SHARED)
    b = gl.allocate_shared_memory(w_desc.dtype, [STAGES, WIDTH, BLOCK_K], SHARED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + 32 * LOAD_WARPS if GATE_UP else 1)  # TMA, and each gathering thread
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (_multiply, (0, bias_ptr, out_ptr, out_stride, index_ptr, tiles_ptr, num_tiles_ptr, depth, columns,
                         a, b, full, empty, turns, GATE_UP, GROUP_M, STORE, BIAS, LIMIT, OUT_AT)),
            (_multiply, (1, bias_ptr, out_ptr, out_stride, index_ptr, tiles_ptr, num_tiles_ptr, depth, columns,
                         a, b, full, empty, turns, GATE_UP, GROUP_M, STORE, BIAS, LIMIT, OUT_AT)),
            (_load, (x, x_stride, w_desc, index_ptr, tiles_ptr, num_tiles_ptr, depth, columns,
                     a, b, full, empty, GATE_UP, GROUP_M, LOAD_WARPS)),
        ],
        [4, LOAD_WARPS],
        [232, 40],  # registers of a thread of the second consumer and of the producer
    )  # fmt: skip


def gate_up(
    x: torch.Tensor, w13: torch.Tensor, bias: torch.Tensor | None, limit: float, activations: torch.Tensor,
    grouping: Grouping, cut: Tiling, programs: int,
) -> None:  # fmt: skip
    """The first product of `GroupedExperts.ffn`; bias: [experts, 2 * intermediate]."""
    if x.data_ptr() % 16 or x.stride(0) % 16:  # cp.async moves 16 bytes
        x = x.clone(memory_format=torch.contiguous_format)
    _launch(
        x, x.stride(0), w13, bias, activations, activations.stride(0), grouping.rows, grouping, cut, programs,
        GATE_UP=True, LIMIT=limit, OUT_AT=False,
    )  # fmt: skip


def down(
    activations: torch.Tensor, w2: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor,
    grouping: Grouping, cut: Tiling, programs: int,
) -> None:  # fmt: skip
    """The second one; bias: [experts, hidden]."""
    x = TensorDescriptor.from_tensor(activations, [PING_PONG.block_m, cut.block_k], SHARED.value)
    out_at = out.dtype == torch.int64
    _launch(
        x, 0, w2, bias, out, w2.shape[1] if out_at else out.stride(0), grouping.order, grouping, cut, programs,
        GATE_UP=False, LIMIT=0.0, OUT_AT=out_at,
    )  # fmt: skip


def _launch(
    x: Any, x_stride: int, w: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, out_stride: int,
    index: torch.Tensor, grouping: Grouping, cut: Tiling, programs: int, *, GATE_UP: bool, **chosen: Any,
) -> None:  # fmt: skip
    columns, depth = w.shape[1] // (2 if GATE_UP else 1), w.shape[2]
    w_desc = TensorDescriptor.from_tensor(w.view(-1, depth), [cut.block_n, cut.block_k], SHARED.value)
    items = grouping.max_tiles * triton.cdiv(columns, cut.block_n)
    ping_pong_kernel[(min(items, programs),)](
        x, x_stride, w_desc, w if bias is None else bias, out, out_stride, index, grouping.tiles, grouping.num_tiles,
        depth, columns, GATE_UP=GATE_UP, STAGES=cut.stages, GROUP_M=cut.group_m, STORE=store_layout(cut.block_n),
        BIAS=bias is not None, num_warps=4, **chosen,
    )  # fmt: skip


def store_layout(columns: int) -> gl.DistributedLinearLayout:
    """Of a result in registers: a warp keeps the 16 rows that it multiplied, a thread stores 16 bytes at a time."""
    further = [[0, 32 << i] for i in range((columns // 32).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0], *further],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[PING_PONG.block_m, columns],
    )
