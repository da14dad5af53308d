"""The two grouped GEMMs of an expert FFN for many rows per expert: gate/up with SwiGLU, and down.

Every output element is one accumulator that runs over K in ascending order, 16 at a time, whatever the tile: no
split-K, no second accumulator. That is why a row's bits depend neither on the number of rows nor on the tile that
computes it.

Programs stride over the work items, and the loads of the next one start under the last one's epilogue. Weights and
down's rows come through TMA descriptors; token rows are gathered by pointer, which Hopper's TMA cannot. With `SWAP` the
weights of down are the left operand.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_activation import add_bias, gated
from kernels.triton_grouping import TILE_FIELDS


@triton.jit
def share_blocks(index, n_blocks, tiles, GROUP_M: tl.constexpr):
    """Tile, of an expert's `tiles`, and weight block of its work item `index`.

    Up to GROUP_M tiles share each weight block before the next one: every weight is read from memory once per group,
    and the rows of a group stay in L2.
    """
    per_group = GROUP_M * n_blocks
    start = (index // per_group) * GROUP_M
    height = tl.minimum(tiles - start, GROUP_M)
    rest = index % per_group
    return start + rest % height, rest // height


@triton.jit
def _locate(index, tiles_ptr, n_blocks, GROUP_M: tl.constexpr):
    """Tile and weight block of a work item."""
    some_tile = tiles_ptr + TILE_FIELDS * (index // n_blocks)  # of the same expert
    first = tl.load(some_tile + 3)
    tile, block = share_blocks(index - first * n_blocks, n_blocks, tl.load(some_tile + 4), GROUP_M)
    return first + tile, block


@triton.jit
def multiply(x, w, acc, SWAP: tl.constexpr):
    """acc + x @ w.T for x [M, K] and w [N, K]: [M, N], or with SWAP its transpose, [N, M]."""
    if SWAP:
        return tl.dot(w, x.T, acc)
    else:
        return tl.dot(x, w.T, acc)


@triton.jit
def zeros(M: tl.constexpr, N: tl.constexpr, SWAP: tl.constexpr):
    """The accumulator that `multiply` begins with, float32."""
    if SWAP:
        return tl.zeros((N, M), tl.float32)
    else:
        return tl.zeros((M, N), tl.float32)


@triton.jit
def _gate_up_tile(
    x_ptr, x_stride, w_desc, bias_ptr, act_ptr, rows_ptr, start, rows, expert, block_n, hidden, intermediate,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    BIAS: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    live = m < rows
    row = tl.load(rows_ptr + start + m, mask=live, other=0)
    x_ptrs = x_ptr + row.to(tl.int64)[:, None] * x_stride + k[None, :]
    column = block_n * BLOCK_N
    both = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
    for k0 in range(0, hidden, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs + k0, mask=live[:, None], other=0.0)
        else:
            x = tl.load(x_ptrs + k0, mask=live[:, None] & (k[None, :] < hidden - k0), other=0.0)
        w = w_desc.load([expert * 2, column, k0]).reshape(2 * BLOCK_N, BLOCK_K)
        both = tl.dot(x, w.T, both)  # one product twice as wide reads x from shared memory once
    gate, up = tl.split(both.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1))
    n = column + tl.arange(0, BLOCK_N)
    act = gated(gate, up, bias_ptr, expert, n, intermediate, False, BIAS, LIMIT).to(act_ptr.dtype.element_ty)
    act_ptrs = act_ptr + (start + m).to(tl.int64)[:, None] * intermediate + n[None, :]
    tl.store(act_ptrs, act, mask=live[:, None] & (n < intermediate)[None, :])


@triton.jit
def gate_up_kernel(
    x_ptr, x_stride, w_desc, bias_ptr, act_ptr, rows_ptr, tiles_ptr, num_tiles_ptr, hidden, intermediate,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, BIAS: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """act[position, i] = silu(x @ gate.T) * (x @ up.T), or with a LIMIT gpt-oss's activation.

    w_desc: [experts * 2, intermediate, hidden], gate before up. bias_ptr: [experts, 2 * intermediate], read with BIAS.
    """
    num_tiles = tl.load(num_tiles_ptr)
    n_blocks = tl.cdiv(intermediate, BLOCK_N)
    for index in tl.range(tl.program_id(0), num_tiles * n_blocks, tl.num_programs(0), flatten=True):
        tile, block_n = _locate(index, tiles_ptr, n_blocks, GROUP_M)
        entry = tiles_ptr + TILE_FIELDS * tile
        expert = tl.load(entry)
        start = tl.load(entry + 1)
        rows = tl.load(entry + 2)
        _gate_up_tile(
            x_ptr, x_stride, w_desc, bias_ptr, act_ptr, rows_ptr, start, rows, expert, block_n, hidden, intermediate,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, BIAS, LIMIT,
        )  # fmt: skip


@triton.jit
def _down_tile(
    act_desc, w_desc, bias_ptr, out_ptr, out_stride, order_ptr, start, rows, w_row, block_n, hidden, intermediate,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    m = tl.arange(0, BLOCK_M)
    live = m < rows
    acc = zeros(BLOCK_M, BLOCK_N, SWAP)
    for k0 in range(0, intermediate, BLOCK_K):
        # rows past the tile belong to others: they are read, and their products not stored
        acc = multiply(act_desc.load([start, k0]), w_desc.load([w_row, k0]), acc, SWAP)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if BIAS:
        acc = add_bias(acc, bias_ptr + (w_row - block_n * BLOCK_N), n, n < hidden, SWAP)
    result = acc.to(out_ptr.dtype.element_ty)
    if SWAP:
        result = result.T
    pair = tl.load(order_ptr + start + m, mask=live, other=0)
    out_ptrs = out_ptr + pair.to(tl.int64)[:, None] * out_stride + n[None, :]
    tl.store(out_ptrs, result, mask=live[:, None] & (n < hidden)[None, :])


@triton.jit
def down_kernel(
    act_desc, w_desc, bias_ptr, out_ptr, out_stride, order_ptr, tiles_ptr, num_tiles_ptr, hidden, intermediate,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SWAP: tl.constexpr, BIAS: tl.constexpr, OUT_AT: tl.constexpr,
):  # fmt: skip
    """out[pair] = act[position of pair] @ w.T; w_desc: [experts * hidden, intermediate].

    With OUT_AT out_ptr points to the address of out, bf16, a multiple of 16.
    bias_ptr: [experts, hidden], added with BIAS.
    """
    if OUT_AT:
        out_ptr = tl.multiple_of(tl.load(out_ptr).to(tl.pointer_type(tl.bfloat16)), 16)
    num_tiles = tl.load(num_tiles_ptr)
    n_blocks = tl.cdiv(hidden, BLOCK_N)
    for index in tl.range(tl.program_id(0), num_tiles * n_blocks, tl.num_programs(0), flatten=True):
        tile, block_n = _locate(index, tiles_ptr, n_blocks, GROUP_M)
        entry = tiles_ptr + TILE_FIELDS * tile
        w_row = tl.load(entry) * hidden + block_n * BLOCK_N
        start = tl.load(entry + 1)
        rows = tl.load(entry + 2)
        _down_tile(
            act_desc, w_desc, bias_ptr, out_ptr, out_stride, order_ptr, start, rows, w_row, block_n,
            hidden, intermediate, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, BIAS,
        )  # fmt: skip
