"""Block-scaled fp8 weights of a checkpoint as plain ones."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

BLOCK = 128
"""Rows and columns that one scale covers; at the edges fewer."""

FP16_LIMIT = 65520.0  # from here on the nearest fp16 number is infinity


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """codes: [rows, columns] float8_e4m3fn; scale: [rows / 128, columns / 128], rounded up; the weights in float32.

    Products of bf16 scales are exact, those of float32 ones rounded once.
    """
    rows, columns = codes.shape
    # a look-up is four times as fast as the conversion of torch 2.13 on a CPU
    values = _values().index_select(0, codes.view(torch.uint8).reshape(-1).to(torch.int32)).view(rows, columns)
    missing = (0, -columns % BLOCK, 0, -rows % BLOCK)
    blocks = (F.pad(values, missing) if any(missing) else values).view(scale.shape[0], BLOCK, scale.shape[1], BLOCK)
    blocks.mul_(scale.float()[:, None, :, None])
    return blocks.view(scale.shape[0] * BLOCK, -1)[:rows, :columns].contiguous()


def to_fp16(weight: torch.Tensor) -> torch.Tensor:
    """Weights that were fp8 as the nearest fp16 values; unchanged float32 where one lies beyond fp16.

    They move by 2^-11 of themselves at most, below 2^-14 by 2^-25: by a 128th of half the distance between two fp8
    values, and by an eighth of what bf16 would take.
    """
    low, high = torch.aminmax(weight)
    return weight.half() if max(-float(low), float(high)) < FP16_LIMIT else weight


@functools.cache
def _values() -> torch.Tensor:
    """The number that each code stands for."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
