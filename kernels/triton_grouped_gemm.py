"""The two grouped GEMMs of an expert FFN: gate/up with SwiGLU, and down.

Every output element is one accumulator that runs over K in ascending order, 16 at a time, whatever the tile: no
split-K, no second accumulator. That is why a row's bits depend neither on the number of rows nor on the tile that
computes it.

`SWAP` makes the weights the left operand (their rows are the 64 rows of a wgmma, the tokens its width of 8 to 256): a
tile of 16 tokens then costs no padding to 64. Weights come through TMA descriptors; token rows are gathered by pointer,
which Hopper's TMA cannot.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_activation import add_bias, gated
from kernels.triton_grouping import TILE_FIELDS


@triton.jit
def _locate(index, tiles_ptr, n_blocks, GROUP_M: tl.constexpr):
    """Tile and weight block of a work item.

    Up to GROUP_M tiles of one expert share each weight block before the next one: every weight is read from memory once
    per group, and the rows of a group stay in L2.
    """
    some_tile = tiles_ptr + TILE_FIELDS * (index // n_blocks)  # of the same expert
    first = tl.load(some_tile + 3)
    tiles = tl.load(some_tile + 4)
    inside = index - first * n_blocks
    per_group = GROUP_M * n_blocks
    start = (inside // per_group) * GROUP_M
    height = tl.minimum(tiles - start, GROUP_M)
    rest = inside % per_group
    return first + start + rest % height, rest // height


@triton.jit
def _multiply(x, w, acc, SWAP: tl.constexpr):
    if SWAP:
        return tl.dot(w, x.T, acc)
    else:
        return tl.dot(x, w.T, acc)


@triton.jit
def _zeros(M: tl.constexpr, N: tl.constexpr, SWAP: tl.constexpr):
    if SWAP:
        return tl.zeros((N, M), tl.float32)
    else:
        return tl.zeros((M, N), tl.float32)


@triton.jit
def _gate_up_tile(
    x_ptr, x_stride, w_desc, w_pair_desc, bias_ptr, act_ptr, rows_ptr, start, rows, expert, block_n,
    hidden, intermediate,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr, EVEN_K: tl.constexpr,
    BIAS: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    live = m < rows
    row = tl.load(rows_ptr + start + m, mask=live, other=0)
    x_ptrs = x_ptr + row.to(tl.int64)[:, None] * x_stride + k[None, :]
    column = block_n * BLOCK_N
    gate_row = expert * 2 * intermediate + column
    if SWAP:
        gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        up = gate
    else:
        both = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
    for k0 in range(0, hidden, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs + k0, mask=live[:, None], other=0.0)
        else:
            x = tl.load(x_ptrs + k0, mask=live[:, None] & (k[None, :] < hidden - k0), other=0.0)
        if SWAP:  # the left operand must not be reshaped: it would travel through registers
            gate = tl.dot(w_desc.load([gate_row, k0]), x.T, gate)
            up = tl.dot(w_desc.load([gate_row + intermediate, k0]), x.T, up)
        else:  # one product twice as wide reads x from shared memory once
            w = w_pair_desc.load([expert * 2, column, k0]).reshape(2 * BLOCK_N, BLOCK_K)
            both = tl.dot(x, w.T, both)
    if not SWAP:
        gate, up = tl.split(both.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1))
    n = column + tl.arange(0, BLOCK_N)
    act = gated(gate, up, bias_ptr, expert, n, intermediate, SWAP, BIAS, LIMIT).to(act_ptr.dtype.element_ty)
    if SWAP:
        act = act.T
    act_ptrs = act_ptr + (start + m).to(tl.int64)[:, None] * intermediate + n[None, :]
    tl.store(act_ptrs, act, mask=live[:, None] & (n < intermediate)[None, :])


@triton.jit
def gate_up_kernel(
    x_ptr, x_stride, w_desc, w_pair_desc, bias_ptr, act_ptr, rows_ptr, tiles_ptr, num_tiles_ptr, hidden, intermediate,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SWAP: tl.constexpr, EVEN_K: tl.constexpr, FLATTEN: tl.constexpr, BIAS: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """act[position, i] = silu(x @ gate.T) * (x @ up.T), or with a LIMIT gpt-oss's activation.

    w_desc: [experts * 2 * intermediate, hidden], gate above up; w_pair_desc: the same memory as
    [experts * 2, intermediate, hidden]. bias_ptr: [experts, 2 * intermediate], read with BIAS.
    """
    num_tiles = tl.load(num_tiles_ptr)
    n_blocks = tl.cdiv(intermediate, BLOCK_N)
    for index in tl.range(tl.program_id(0), num_tiles * n_blocks, tl.num_programs(0), flatten=FLATTEN):
        tile, block_n = _locate(index, tiles_ptr, n_blocks, GROUP_M)
        entry = tiles_ptr + TILE_FIELDS * tile
        expert = tl.load(entry)
        start = tl.load(entry + 1)
        rows = tl.load(entry + 2)
        _gate_up_tile(
            x_ptr, x_stride, w_desc, w_pair_desc, bias_ptr, act_ptr, rows_ptr, start, rows, expert, block_n,
            hidden, intermediate, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, EVEN_K, BIAS, LIMIT,
        )  # fmt: skip


@triton.jit
def _down_tile(
    act_ptr, act_desc, w_desc, bias_ptr, out_ptr, out_stride, order_ptr, start, rows, w_row, block_n,
    hidden, intermediate,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr, EVEN_K: tl.constexpr,
    ACT_TMA: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    live = m < rows
    act_ptrs = act_ptr + (start + m).to(tl.int64)[:, None] * intermediate + k[None, :]
    acc = _zeros(BLOCK_M, BLOCK_N, SWAP)
    for k0 in range(0, intermediate, BLOCK_K):
        if ACT_TMA:  # rows past the tile belong to others: they are read, and their products not stored
            x = act_desc.load([start, k0])
        elif EVEN_K:
            x = tl.load(act_ptrs + k0, mask=live[:, None], other=0.0)
        else:
            x = tl.load(act_ptrs + k0, mask=live[:, None] & (k[None, :] < intermediate - k0), other=0.0)
        acc = _multiply(x, w_desc.load([w_row, k0]), acc, SWAP)
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
    act_ptr, act_desc, w_desc, bias_ptr, out_ptr, out_stride, order_ptr, tiles_ptr, num_tiles_ptr,
    hidden, intermediate,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SWAP: tl.constexpr, EVEN_K: tl.constexpr, FLATTEN: tl.constexpr, ACT_TMA: tl.constexpr,
    BIAS: tl.constexpr, OUT_AT: tl.constexpr,
):  # fmt: skip
    """out[pair] = act[position of pair] @ w.T; w_desc: [experts * hidden, intermediate].

    With OUT_AT out_ptr points to the address of out, bf16, a multiple of 16.
    bias_ptr: [experts, hidden], added with BIAS.
    """
    if OUT_AT:
        out_ptr = tl.multiple_of(tl.load(out_ptr).to(tl.pointer_type(tl.bfloat16)), 16)
    num_tiles = tl.load(num_tiles_ptr)
    n_blocks = tl.cdiv(hidden, BLOCK_N)
    for index in tl.range(tl.program_id(0), num_tiles * n_blocks, tl.num_programs(0), flatten=FLATTEN):
        tile, block_n = _locate(index, tiles_ptr, n_blocks, GROUP_M)
        entry = tiles_ptr + TILE_FIELDS * tile
        w_row = tl.load(entry) * hidden + block_n * BLOCK_N
        start = tl.load(entry + 1)
        rows = tl.load(entry + 2)
        _down_tile(
            act_ptr, act_desc, w_desc, bias_ptr, out_ptr, out_stride, order_ptr, start, rows, w_row, block_n,
            hidden, intermediate, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, EVEN_K, ACT_TMA, BIAS,
        )  # fmt: skip
