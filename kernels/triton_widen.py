"""fp8 and MXFP4 weights (see quantized_weight.py) to bf16 in registers, exactly, in the order of the tensor cores."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _times(pair, scales, HIGH: tl.constexpr, ASM: tl.constexpr):
    """The two bf16 in a word times the one in the upper (HIGH) or lower half of `scales`."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            .reg .b32 scale, product;
            mov.b32 {low, high}, $3;
            mov.b32 scale, {high, high};
            mul.rn.bf16x2 product, $2, scale;
            mov.b32 {$0, $1}, product;
            }"""
            if HIGH
            else """{
            .reg .b16 low, high;
            .reg .b32 scale, product;
            mov.b32 {low, high}, $3;
            mov.b32 scale, {low, low};
            mul.rn.bf16x2 product, $2, scale;
            mov.b32 {$0, $1}, product;
            }""",
            "=h,=h,r,r", [pair, scales], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        scale = (scales & 0xFFFF0000 if HIGH else scales << 16).to(tl.float32, bitcast=True)
        even, odd = (pair << 16).to(tl.float32, bitcast=True), (pair & 0xFFFF0000).to(tl.float32, bitcast=True)
        return (even * scale).to(tl.bfloat16), (odd * scale).to(tl.bfloat16)


@triton.jit
def widen_fp8(packed, ASM: tl.constexpr):
    """[rows, 32] int32 -> bf16 [rows, 128]. In place, an e4m3's bits read as 2^-120 of its value."""
    rows: tl.constexpr = packed.shape[0]
    word = packed.to(tl.uint32, bitcast=True)
    scale = (word & 0) | 0x7B807B80  # not tl.full: Gluon asks that for a layout
    second = (((word << 8) | (word >> 24)) & 0x07700770) | (((word << 12) | (word >> 20)) & 0x80808080)
    a0, a1 = _times(word & 0x87F087F0, scale, False, ASM)
    b0, b1 = _times(second, scale, False, ASM)
    both = tl.join(tl.join(a0, b0), tl.join(a1, b1)).reshape(rows, 4, 8, 2, 2)  # thread, word, pair, odd
    return both.permute(0, 2, 3, 1, 4).reshape(rows, 128)


@triton.jit
def _widen_mxfp4_words(word, scales, HIGH: tl.constexpr, ASM: tl.constexpr):
    """Words times one half of `scales`: bf16 [..., pair // 2, pair % 2, odd]."""
    a0, a1 = _times(word & 0x81C081C0, scales, HIGH, ASM)
    b0, b1 = _times(((word >> 3) | (word << 29)) & 0x81C081C0, scales, HIGH, ASM)
    c0, c1 = _times(((word >> 6) | (word << 26)) & 0x81C081C0, scales, HIGH, ASM)
    d0, d1 = _times((word & 0x001B001B) * 0x4108 & 0x81C081C0, scales, HIGH, ASM)
    return tl.join(tl.join(tl.join(a0, c0), tl.join(b0, d0)), tl.join(tl.join(a1, c1), tl.join(b1, d1)))


@triton.jit
def widen_mxfp4(packed, scales, RUNS: tl.constexpr, ASM: tl.constexpr):
    """[rows, RUNS, 16] and [rows, RUNS, 4] int32, a scale word for each thread -> bf16 [rows, 128 * RUNS], 2^-16 of the
    weights.

    In place, an e2m1's bits read as 2^-126 of its value, and 2^110 is part of the scales.
    """
    rows: tl.constexpr = packed.shape[0]
    words = packed.to(tl.uint32, bitcast=True).reshape(rows, RUNS, 4, 2, 2).permute(0, 1, 2, 4, 3)
    first, second = tl.split(words)
    word0, word1 = tl.split(first)
    word2, word3 = tl.split(second)
    scales = scales.to(tl.uint32, bitcast=True)
    front, back = scales & 0x7F807F80, ((scales << 8) | (scales >> 24)) & 0x7F807F80
    even = tl.join(_widen_mxfp4_words(word0, front, False, ASM), _widen_mxfp4_words(word2, back, False, ASM))
    odd = tl.join(_widen_mxfp4_words(word1, front, True, ASM), _widen_mxfp4_words(word3, back, True, ASM))
    # [rows, run, thread, pair // 2, pair % 2, odd column, word // 2, word % 2]
    return tl.join(even, odd).permute(0, 1, 6, 7, 3, 4, 2, 5).reshape(rows, 128 * RUNS)


@triton.jit
def widen_mxfp4_half(even, odd, scales, SECOND: tl.constexpr, ASM: tl.constexpr):
    """Half of a run's columns, the first or the second 64, as `widen_mxfp4`.

    A thread's even and its odd word of them and the scales of the run, all [rows, 4] uint32 -> bf16 [rows, 64].
    """
    if SECOND:
        scales = (scales << 8) | (scales >> 24)
    scales = scales & 0x7F807F80
    both = tl.join(
        _widen_mxfp4_words(even, scales, False, ASM), _widen_mxfp4_words(odd, scales, True, ASM)
    )  # [rows, thread, pair // 2, pair % 2, odd column, word]
    return both.permute(0, 5, 2, 3, 1, 4).reshape(even.shape[0], 64)
