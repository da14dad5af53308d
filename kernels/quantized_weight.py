"""fp8 and MXFP4 weights in the layout of the Triton kernels, and the way there from a checkpoint's.

128 columns of a row are 32 words (fp8) or 16 (MXFP4), a quarter of them for each of the four threads of the tensor
cores that share a row: thread c has pairs of columns 8j + 2c, two after each other. A pair's bits lie in its word so
that a turn of the word and a mask (or what is said below) put each of the two where a bf16 has them: the sign in bit
15, the exponent's lowest bit in 7, the mantissa's highest in 6. The even column's bf16 is the lower half of a register.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

COLUMNS = 128
"""What is stored together of each row. One fp8 scale covers as many, and as many rows."""

FP8_PLACES = ((15, 10, 9, 8, 7, 6, 5, 4), (3, 2, 1, 0, 27, 30, 29, 28))
"""Where the even column's bits of both pairs of a word lie, from sign to mantissa; the odd one's, 16 places on.

The second pair's sign and lowest exponent bit are in place when the word is turned left by 12, its other bits by 8.
"""

MXFP4_PLACES = ((15, 8, 7, 6), (18, 11, 10, 9), (21, 14, 13, 12), (1, 0, 4, 3))
"""The same for the four pairs of an MXFP4 word.

The second is in place when the word is turned right by 3, the third by 6, the last one's bits, alone, times 0x4108.
"""

MXFP4_SCALES = range(18, 145)
"""Scales that the kernels take, as stored (exponent + 127): times a weight and 2^-16 they are normal bf16 numbers."""


@dataclass(frozen=True)
class QuantizedWeight:
    """One stacked projection of all local experts, made by `pack_fp8` or `pack_mxfp4`.

    data: [experts, depth / 128, rows, 32 or 16] int32. scale: fp8 [experts, rows / 128, depth / 128] float32; MXFP4
    [experts, depth / 128, rows] int32, see `pack_mxfp4`.
    """

    data: torch.Tensor
    scale: torch.Tensor

    @property
    def mxfp4(self) -> bool:
        """Which of the two formats."""
        return self.data.shape[-1] == COLUMNS // 8

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, rows, depth) of the weights; the depth is what is stored, a multiple of 128."""
        experts, runs, rows, _ = self.data.shape
        return experts, rows, runs * COLUMNS


def pack_fp8(data: torch.Tensor, scale: torch.Tensor) -> QuantizedWeight:
    """Rearrange a checkpoint's layout once.

    data: [experts, rows, depth] float8_e4m3fn; scale: [experts, rows / 128, depth / 128] float32.
    Raises ValueError for other shapes and types, and for NaN.
    """
    experts, rows, depth = data.shape
    wanted = (experts, rows // COLUMNS, depth // COLUMNS)
    if data.dtype != torch.float8_e4m3fn or rows % COLUMNS or depth % COLUMNS:
        raise ValueError(f"{data.dtype} weights {rows} by {depth}, want float8_e4m3fn and multiples of {COLUMNS}")
    if scale.shape != wanted or scale.dtype != torch.float32:
        raise ValueError(f"scales {tuple(scale.shape)} {scale.dtype}, want {wanted} float32")
    codes = data.contiguous().view(torch.uint8)
    if codes.numel() and int((codes & 127).max()) == 127:
        raise ValueError("weights that are not a number")
    return QuantizedWeight(_pack(codes.view(torch.int16), FP8_PLACES), scale.contiguous())


def pack_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> QuantizedWeight:
    """Rearrange a checkpoint's layout once; a depth that is no multiple of 128 is filled up with zeros.

    blocks: [experts, rows, depth / 2] uint8, weight 2i in the low nibble of byte i; scales: [experts, rows, depth / 32]
    uint8. The four scales of 128 columns become the exponents of bf16 numbers of 2^110 times their value: the first in
    the lower half of a word, the second in the upper one, and in what is left the third and the fourth the same way,
    turned right by 8.

    Raises ValueError for other shapes, and for scales outside `MXFP4_SCALES`.
    """
    experts, rows, half = blocks.shape
    if half % 16 or rows % 8 or scales.shape != (experts, rows, half // 16):
        raise ValueError(
            f"{rows} rows, want a multiple of 8, of depth {2 * half}, want one of 32, scales {scales.shape}"
        )
    if int(scales.min()) not in MXFP4_SCALES or int(scales.max()) not in MXFP4_SCALES:
        raise ValueError(f"scales {int(scales.min())} to {int(scales.max())}, want {MXFP4_SCALES}")
    missing = -half % (COLUMNS // 2)
    blocks = torch.nn.functional.pad(blocks, (0, missing))
    scales = torch.nn.functional.pad(scales, (0, missing // 16), value=MXFP4_SCALES[0])
    exponents = scales.view(experts, rows, -1, 4).transpose(1, 2).to(torch.int64) + 110
    first, second, third, fourth = exponents.unbind(-1)
    words = first << 7 | second << 23 | third >> 1 | (third & 1) << 31 | fourth << 15
    return QuantizedWeight(_pack(blocks, MXFP4_PLACES), _as_int32(words).contiguous())


def _pack(pairs: torch.Tensor, places: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """Codes to words [experts, depth / 128, rows, 128 / codes per word] int32.

    pairs: [experts, rows, depth / 2], the codes of two columns in each number, the even one's in the low bits.
    """
    experts, rows, half = pairs.shape
    tables = _tables(places).to(pairs.device)
    runs, words = 2 * half // COLUMNS, COLUMNS // (8 * len(places))
    pairs = pairs.view(experts, rows, runs, words, len(places), 4)
    # pair, expert, run, row, thread, word: moved while numbers are small, that takes most of the time
    pairs = pairs.permute(4, 0, 2, 1, 5, 3).reshape(len(places), -1).to(torch.int32) & (tables.shape[1] - 1)
    packed = tables[0].index_select(0, pairs[0])
    for table, pair in zip(tables[1:], pairs[1:], strict=True):
        packed |= table.index_select(0, pair)
    return packed.view(experts, runs, rows, 4 * words)


@functools.cache
def _tables(places: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """[pairs of a word, 4 ** bits] int32: what the codes of two columns contribute to a word."""
    bits = len(places[0])
    halves = torch.tensor([0, 16])[:, None] + torch.tensor(places)[:, None]  # pair, odd, bit
    is_set = torch.arange(1 << bits)[:, None] >> torch.arange(bits - 1, -1, -1) & 1
    codes = (is_set << (halves % 32)[:, :, None]).sum(-1)  # pair, odd, code
    return _as_int32(codes[:, 1, :, None] | codes[:, 0, None, :]).flatten(1)


def _as_int32(words: torch.Tensor) -> torch.Tensor:
    """The low 32 bits of int64 words."""
    return (words << 32 >> 32).to(torch.int32)
