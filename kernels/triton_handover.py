"""How programs of one launch get what others of it compute: a counter, zero before a launch and after it.

Producers arrive, consumers wait until all of them have, and the last consumer to leave sets the counter to zero again.
That ends if no producer waits and all have smaller program ids than the consumers: programs start in the order of their
ids, so when a consumer runs, all producers have started. In the interpreter programs run one after another: nothing is
to be counted.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def arrive(counter_ptr):
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
def leave(counter_ptr, last):
    """Count up; the program that finds it at `last` sets it to 0, for the next launch."""
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
def load_rows(row_ptrs, live, k0, counter_ptr, wanted, DEPTH: tl.constexpr, BLOCK_K: tl.constexpr, WAIT: tl.constexpr):
    """BLOCK_K columns of some rows from k0 on, zeros where there are none; row_ptrs: [rows, 1], live: [rows].

    With WAIT, in a loop over k0 from 0 on, the rows are there once the counter is at `wanted`.
    """
    k = tl.arange(0, BLOCK_K)
    mask = live[:, None]
    if WAIT:
        mask = mask & (_wait(counter_ptr, wanted, k0) == 0)
    if DEPTH % BLOCK_K != 0:
        mask = mask & (k[None, :] < DEPTH - k0)
    return tl.load(row_ptrs + k0 + k[None, :], mask=mask, other=0.0)
