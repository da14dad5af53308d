"""`quantized_weight.pack_fp8` as a kernel: a matrix of a checkpoint's codes that is on the device already."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.quantized_weight import COLUMNS

ROWS = 32
"""Of a program, which packs 128 columns of them: what it writes is contiguous."""


@triton.jit
def _placed(pair):
    """The codes of two columns, the even one's in the low byte, to where two bf16 have their bits."""
    codes = (pair & 0x00FF) | ((pair & 0xFF00) << 8)
    return ((codes & 0x00800080) << 8) | ((codes & 0x007F007F) << 4)


@triton.jit
def _pack_fp8_kernel(pairs_ptr, words_ptr, rows, half_depth, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    run, word = tl.program_id(1), tl.arange(0, 32)
    at = row[:, None] * half_depth + run * 64 + (word % 8 * 8 + word // 8)[None, :]
    first = _placed(tl.load(pairs_ptr + at).to(tl.uint32))
    second = _placed(tl.load(pairs_ptr + at + 4).to(tl.uint32))
    by_8, by_12 = second & 0x07700770, second & 0x80808080  # what is turned right by so many places: see FP8_PLACES
    packed = first | (by_8 >> 8) | (by_8 << 24) | (by_12 >> 12) | (by_12 << 20)
    out = words_ptr + (run * rows + row[:, None]) * 32 + word[None, :]
    tl.store(out, packed.to(tl.int32, bitcast=True))


def pack_fp8_into(words: torch.Tensor, codes: torch.Tensor) -> None:
    """Launch what writes `pack_fp8(codes).data[0]` to `words`; it does not look for codes that are not a number.

    words: [depth / 128, rows, 32] int32; codes: [rows, depth] uint8.
    Raises ValueError for other shapes and types.
    """
    rows, depth = codes.shape
    wanted = (depth // COLUMNS, rows, COLUMNS // 4)
    if codes.dtype != torch.uint8 or rows % COLUMNS or depth % COLUMNS or not codes.is_contiguous():
        raise ValueError(f"{codes.dtype} codes {rows} by {depth}, want contiguous bytes, multiples of {COLUMNS}")
    if words.shape != wanted or words.dtype != torch.int32 or not words.is_contiguous():
        raise ValueError(f"words {tuple(words.shape)} {words.dtype}, want {wanted} int32, contiguous")
    _pack_fp8_kernel[rows // ROWS, depth // COLUMNS](codes.view(torch.int16), words, rows, depth // 2, ROWS=ROWS)
