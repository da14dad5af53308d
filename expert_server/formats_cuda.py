"""What one expert is in GPU memory: its tensors, how a checkpoint's weights become them, and the kernels that use them.

Slots, host replicas and copies know sizes and bytes only. Weights are bf16, or fp8 in the words of the kernels
(`kernels.quantized_weight`), half as large. On the host fp8 weights are as the checkpoint has them: packing takes the
GPU microseconds, a core 8 ms for an expert of 4.7 MB.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from kernels.dequantize import BLOCK
from kernels.quantized_weight import COLUMNS, QuantizedWeight
from kernels.tensors import as_tensor, stored_tensor
from kernels.triton_expert_ffn import GroupedExperts, numerics_fingerprint
from kernels.triton_pack import pack_fp8_into
from kernels.triton_quantized_ffn import QuantizedExperts, fp8_fingerprint
from moering.checkpoint import Checkpoint, ExpertWeights
from moering.errors import ConfigError
from moering.quantization import FP8

Part = tuple[tuple[int, ...], torch.dtype]
"""Shape and type of a tensor."""


class Format(Protocol):
    """See the module's docstring."""

    hidden: int
    intermediate: int
    parts: Sequence[Part]
    """Of an expert in its slot."""
    host_parts: Sequence[Part]
    """Of an expert on the host, as many bytes; the same where these bytes are copied to a slot as they are."""

    def fill(self, out: Sequence[torch.Tensor], weights: ExpertWeights) -> None:
        """Write an expert to `out`, tensors on the host as `host_parts` says."""
        ...

    def arrange(self, landed: Sequence[torch.Tensor], slot: Sequence[torch.Tensor]) -> None:
        """Launch what makes a slot's tensors of `landed`, `host_parts` on the device, on the current stream."""
        ...

    def kernels(self, parts: Sequence[torch.Tensor]) -> Any:
        """A `GroupedExperts`, or what has the same methods, on all slots' `parts`, [capacity, …] each."""
        ...

    def fingerprint(self, device: torch.device) -> str:
        """The numerics probe of these kernels."""
        ...


class Bf16:
    """bf16, whatever the checkpoint has; 2 bytes per weight."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        self.hidden, self.intermediate = hidden, intermediate
        self.parts: Sequence[Part] = (
            ((2 * intermediate, hidden), torch.bfloat16),
            ((hidden, intermediate), torch.bfloat16),
        )
        self.host_parts: Sequence[Part] = self.parts

    def fill(self, out: Sequence[torch.Tensor], weights: ExpertWeights) -> None:
        """Gate above up, then down."""
        gate, up, down = map(as_tensor, weights.parts)
        w13, w2 = out
        w13[: self.intermediate].copy_(gate)
        w13[self.intermediate :].copy_(up)
        w2.copy_(down)

    def arrange(self, landed: Sequence[torch.Tensor], slot: Sequence[torch.Tensor]) -> None:
        """Nothing: it has landed in its slot."""

    def kernels(self, parts: Sequence[torch.Tensor]) -> GroupedExperts:
        """See `Format`."""
        w13, w2 = parts
        return GroupedExperts(w13, w2)

    def fingerprint(self, device: torch.device) -> str:
        """See `Format`."""
        return numerics_fingerprint(device)


class Fp8:
    """Packed words of fp8 with a float32 scale for each block; 1 byte per weight."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        """Raises `ConfigError` for sizes that the kernels do not take."""
        if hidden % BLOCK or intermediate % BLOCK:
            raise ConfigError(
                f"--device cuda: fp8 experts of hidden size {hidden} and intermediate size {intermediate}; the kernels "
                f"take multiples of {BLOCK}. --device cpu serves all sizes"
            )
        self.hidden, self.intermediate = hidden, intermediate
        w13, w2 = (2 * intermediate, hidden), (hidden, intermediate)
        self.parts: Sequence[Part] = (_words(*w13), _scales(*w13), _words(*w2), _scales(*w2))
        self.host_parts: Sequence[Part] = (_codes(*w13), _scales(*w13), _codes(*w2), _scales(*w2))

    def fill(self, out: Sequence[torch.Tensor], weights: ExpertWeights) -> None:
        """Gate above up, then down: each the codes and then the scales."""
        codes13, scale13, codes2, scale2 = out
        rows, blocks = self.intermediate, self.intermediate // BLOCK
        places = (codes13[:rows], scale13[:blocks]), (codes13[rows:], scale13[blocks:]), (codes2, scale2)
        for (codes, scale), stored in zip(places, weights.parts, strict=True):
            assert stored.scale is not None  # fp8 ones have some
            codes.copy_(stored_tensor(stored).view(torch.uint8))
            scale.copy_(stored_tensor(stored.scale))

    def arrange(self, landed: Sequence[torch.Tensor], slot: Sequence[torch.Tensor]) -> None:
        """Codes to words; scales as they are."""
        for codes, words in zip(landed[::2], slot[::2], strict=True):
            pack_fp8_into(words, codes)
        for source, scale in zip(landed[1::2], slot[1::2], strict=True):
            scale.copy_(source)

    def kernels(self, parts: Sequence[torch.Tensor]) -> QuantizedExperts:
        """See `Format`."""
        words13, scale13, words2, scale2 = parts
        return QuantizedExperts(QuantizedWeight(words13, scale13), QuantizedWeight(words2, scale2))

    def fingerprint(self, device: torch.device) -> str:
        """See `Format`."""
        return fp8_fingerprint(device)


def format_of(checkpoint: Checkpoint) -> Format:
    """fp8 where all experts are; raise `ConfigError` where only some are, or for sizes that the kernels do not take."""
    sizes = checkpoint.hidden_size, checkpoint.moe_intermediate_size
    if FP8 not in checkpoint.expert_dtypes:
        return Bf16(*sizes)
    if len(checkpoint.expert_dtypes) > 1:
        raise ConfigError(
            f"--device cuda: {checkpoint.path} has experts in {', '.join(sorted(checkpoint.expert_dtypes))}; on a GPU "
            "either all of them are fp8 or none. --device cpu serves both"
        )
    return Fp8(*sizes)


def nbytes(parts: Sequence[Part]) -> int:
    """Bytes of one expert."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts)


def split(memory: torch.Tensor, parts: Sequence[Part]) -> list[torch.Tensor]:
    """An expert's tensors in `memory`, as many bytes; no copy."""
    pieces = memory.split([math.prod(shape) * dtype.itemsize for shape, dtype in parts])
    return [piece.view(dtype).view(shape) for piece, (shape, dtype) in zip(pieces, parts, strict=True)]


def _words(rows: int, depth: int) -> Part:
    return (depth // COLUMNS, rows, COLUMNS // 4), torch.int32


def _codes(rows: int, depth: int) -> Part:
    return (rows, depth), torch.uint8


def _scales(rows: int, depth: int) -> Part:
    return (rows // BLOCK, depth // BLOCK), torch.float32
