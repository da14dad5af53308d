"""The expert FFN of a few pairs in one launch: what takes the time is reading weights, and starting and ending kernels.

The first programs compute gate/up, each a block of the intermediate columns of one expert; the others down. A down
program asks for its first weights, then waits until all gate/up programs of its expert have arrived at a counter. That
ends: programs start in the order of their ids, so when a down program runs, all gate/up programs have started, and they
wait for nobody. In the interpreter programs run one after another, and nothing is counted.

There is no tile list. Each program looks for the pairs of its expert itself; they keep their place among the rows of
the operand, where the others are zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.triton_activation import add_bias, gated

MAX_PAIRS = 8
"""As many fit the one tile, whose rows are the width of an mma."""

_GATE_UP_N, _DOWN_N, _BLOCK_K = 16, 32, 256


@triton.jit
def _arrive(counter_ptr):
    """Count up; who sees it sees all that the program has stored."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def _wait(counter_ptr, wanted, k0):
    """0; in the first step (k0 = 0) not before the counter is at `wanted`.

    It is called pure, since Triton pipelines no loop around anything else: what must come later has to use the result.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .b32 count;
        mov.b32 $0, 0;
        setp.ne.s32 p, $3, 0;
        @p bra DONE;
        AGAIN: ld.acquire.gpu.global.s32 count, [$1];
        setp.lt.s32 p, count, $2;
        @p bra AGAIN;
        DONE:
        }""",
        "=r,l,r,r", [counter_ptr.to(tl.int64), wanted, k0], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _leave(counter_ptr, last):
    """Count up; the program that finds it at `last` sets it to 0, for the next call."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .b32 thread;
        mov.b32 $0, 0;
        mov.u32 thread, %tid.x;
        setp.eq.u32 p, thread, 0;
        @p red.relaxed.gpu.global.inc.u32 [$1], $2;
        }""",
        "=r,l,r", [counter_ptr.to(tl.int64), last], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _product(
    x_ptrs, live, w_desc, first, column, depth, counter_ptr, wanted,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    EVEN_K: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """w @ x.T, [PARTS * BLOCK_N, BLOCK_M]; w_desc: [_, columns, depth], PARTS of the first dimension from `first`.

    With WAIT x is there only once the counter is at `wanted`.
    """
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((PARTS * BLOCK_N, BLOCK_M), tl.float32)
    for k0 in tl.range(0, depth, BLOCK_K, num_stages=STAGES):
        w = w_desc.load([first, column, k0]).reshape(PARTS * BLOCK_N, BLOCK_K)
        mask = live[:, None]
        if WAIT:
            mask = mask & (_wait(counter_ptr, wanted, k0) == 0)
        if not EVEN_K:
            mask = mask & (k[None, :] < depth - k0)
        x = tl.load(x_ptrs + k0 + k[None, :], mask=mask, other=0.0)
        acc = tl.dot(w, x.T, acc)
    return acc


@triton.jit
def _gate_up(
    x_ptrs, live, w_desc, bias_ptr, act_ptrs, expert, column, counter_ptr, hidden, intermediate,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, EVEN_K: tl.constexpr,
    BIAS: tl.constexpr, LIMIT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    both = _product(
        x_ptrs, live, w_desc, expert * 2, column, hidden, counter_ptr, 0,
        BLOCK_M, BLOCK_N, BLOCK_K, 2, STAGES, EVEN_K, False,
    )  # fmt: skip
    gate, up = tl.split(both.reshape(2, BLOCK_N, BLOCK_M).permute(1, 2, 0))
    n = column + tl.arange(0, BLOCK_N)
    act = gated(gate, up, bias_ptr, expert, n, intermediate, True, BIAS, LIMIT).to(act_ptrs.dtype.element_ty)
    tl.store(act_ptrs + n[None, :], act.T, mask=live[:, None] & (n < intermediate)[None, :])
    if ASM:
        _arrive(counter_ptr)


@triton.jit
def _down(
    act_ptrs, live, w_desc, bias_ptr, out_ptrs, expert, column, counter_ptr, wanted, last, hidden, intermediate,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, EVEN_K: tl.constexpr,
    BIAS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    acc = _product(
        act_ptrs, live, w_desc, expert, column, intermediate, counter_ptr, wanted,
        BLOCK_M, BLOCK_N, BLOCK_K, 1, STAGES, EVEN_K, ASM,
    )  # fmt: skip
    n = column + tl.arange(0, BLOCK_N)
    if BIAS:
        acc = add_bias(acc, bias_ptr + expert * hidden, n, n < hidden, True)
    result = acc.to(out_ptrs.dtype.element_ty)
    tl.store(out_ptrs + n[None, :], result.T, mask=live[:, None] & (n < hidden)[None, :])
    if ASM:
        _leave(counter_ptr, last)


@triton.jit(do_not_specialize=["pairs", "top_k"])
def few_pairs_kernel(
    x_ptr, x_stride, w13_desc, w2_desc, bias13_ptr, bias2_ptr, act_ptr, out_ptr, out_stride, experts_ptr, rows_ptr,
    counters_ptr, pairs, top_k, hidden, intermediate,
    BLOCK_M: tl.constexpr, GATE_UP_N: tl.constexpr, DOWN_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GATE_UP_STAGES: tl.constexpr, DOWN_STAGES: tl.constexpr, GATE_UP_EVEN: tl.constexpr, DOWN_EVEN: tl.constexpr,
    BIAS: tl.constexpr, LIMIT: tl.constexpr, OUT_AT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """out[pair] = the FFN of experts[pair], if that is not negative, on row rows[pair], or pair // top_k if top_k > 0.

    w13_desc: [experts * 2, intermediate, hidden], gate before up; w2_desc: [experts, hidden, intermediate].
    act: [pairs, intermediate]. counters: one for each pair, zeros, which they are again at the end.
    With OUT_AT out_ptr points to the address of out, bf16, a multiple of 16. ASM: compiled, not interpreted.
    """
    program = tl.program_id(0)
    gate_up_blocks = tl.cdiv(intermediate, GATE_UP_N)
    down_blocks = tl.cdiv(hidden, DOWN_N)
    down_program = program - pairs * gate_up_blocks
    pair = tl.where(down_program < 0, program // gate_up_blocks, down_program // down_blocks)
    expert = tl.load(experts_ptr + pair)
    m = tl.arange(0, BLOCK_M)
    live = tl.load(experts_ptr + m, mask=m < pairs, other=-1) == expert
    if top_k == 0:
        row = tl.load(rows_ptr + m, mask=m < pairs, other=0)
    else:
        row = m // top_k
    if OUT_AT:
        out_ptr = tl.multiple_of(tl.load(out_ptr).to(tl.pointer_type(tl.bfloat16)), 16)
    act_ptrs = act_ptr + m[:, None] * intermediate
    counter_ptr = counters_ptr + pair
    if (expert >= 0) & (tl.min(tl.where(live, m, BLOCK_M)) == pair):  # the first of an expert's pairs stands for all
        if down_program < 0:
            _gate_up(
                x_ptr + row.to(tl.int64)[:, None] * x_stride, live, w13_desc, bias13_ptr, act_ptrs, expert,
                program % gate_up_blocks * GATE_UP_N, counter_ptr, hidden, intermediate,
                BLOCK_M, GATE_UP_N, BLOCK_K, GATE_UP_STAGES, GATE_UP_EVEN, BIAS, LIMIT, ASM,
            )  # fmt: skip
        else:
            _down(
                act_ptrs, live, w2_desc, bias2_ptr, out_ptr + m.to(tl.int64)[:, None] * out_stride, expert,
                down_program % down_blocks * DOWN_N, counter_ptr, gate_up_blocks, gate_up_blocks + down_blocks - 1,
                hidden, intermediate, BLOCK_M, DOWN_N, BLOCK_K, DOWN_STAGES, DOWN_EVEN, BIAS, ASM,
            )  # fmt: skip


def few_pairs(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, biases: tuple[torch.Tensor, torch.Tensor] | None,
    limit: float, experts: torch.Tensor, rows: torch.Tensor | None, top_k: int, counters: torch.Tensor,
    activations: torch.Tensor, out: torch.Tensor,
) -> None:  # fmt: skip
    """The FFN of up to MAX_PAIRS pairs; see `triton_expert_ffn.GroupedExperts`, whose arguments these are.

    counters: [MAX_PAIRS] int32 zeros, for calls that follow each other. activations: [pairs, intermediate].
    """
    _, hidden, intermediate = w2.shape
    pairs = experts.numel()
    bias13, bias2 = biases or (w13, w2)  # not read without biases
    out_at = out.dtype == torch.int64
    few_pairs_kernel[(pairs * (triton.cdiv(intermediate, _GATE_UP_N) + triton.cdiv(hidden, _DOWN_N)),)](
        x, x.stride(0),
        TensorDescriptor.from_tensor(w13.view(-1, intermediate, hidden), [2, _GATE_UP_N, _BLOCK_K]),
        TensorDescriptor.from_tensor(w2, [1, _DOWN_N, _BLOCK_K]), bias13, bias2, activations,
        out, hidden if out_at else out.stride(0), experts, experts if rows is None else rows, counters,
        pairs, top_k if rows is None else 0, hidden, intermediate,
        BLOCK_M=MAX_PAIRS, GATE_UP_N=_GATE_UP_N, DOWN_N=_DOWN_N, BLOCK_K=_BLOCK_K, GATE_UP_STAGES=5, DOWN_STAGES=6,
        GATE_UP_EVEN=hidden % _BLOCK_K == 0, DOWN_EVEN=intermediate % _BLOCK_K == 0,
        BIAS=biases is not None, LIMIT=limit, OUT_AT=out_at,
        ASM=isinstance(few_pairs_kernel, triton.JITFunction), num_warps=2,
    )  # fmt: skip
