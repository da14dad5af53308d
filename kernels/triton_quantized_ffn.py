"""Grouped expert FFN on fp8 (128 x 128 blocks) and MXFP4 weights, which are never materialised in bf16."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.triton_expert_ffn import check_biases
from kernels.triton_grouping import Grouping, PairGrouper
from kernels.triton_quantized_gemm import FP8_BLOCK, MXFP4_RUN, quantized_down_kernel, quantized_gate_up_kernel


@dataclass(frozen=True)
class QuantizedWeight:
    """One stacked projection of all local experts, [experts, rows, depth].

    fp8: data [experts, rows, depth] float8_e4m3fn, scale [experts, rows / 128, depth / 128] float32.
    MXFP4, as `pack_mxfp4` leaves: data [experts, depth / 64, rows, 8] int32; scale [experts, depth / 64, rows] int16.
    """

    data: torch.Tensor
    scale: torch.Tensor

    @property
    def mxfp4(self) -> bool:
        """Which of the two formats."""
        return self.data.dtype == torch.int32

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, rows, depth) of the weights."""
        if self.mxfp4:
            experts, runs, rows, _ = self.data.shape
            return experts, rows, runs * MXFP4_RUN.value
        experts, rows, depth = self.data.shape
        return experts, rows, depth

    def check(self) -> None:
        """Raise ValueError unless shapes, types and alignment are what the kernels read."""
        experts, rows, depth = self.shape
        unit = MXFP4_RUN.value if self.mxfp4 else FP8_BLOCK.value
        if depth % unit or (not self.mxfp4 and rows % unit):
            raise ValueError(f"{self.data.dtype} weights of shape {self.shape} are no multiples of {unit}")
        block = FP8_BLOCK.value
        wanted = (experts, depth // MXFP4_RUN.value, rows) if self.mxfp4 else (experts, rows // block, depth // block)
        if self.scale.shape != wanted or self.scale.dtype != (torch.int16 if self.mxfp4 else torch.float32):
            raise ValueError(f"scales {tuple(self.scale.shape)} {self.scale.dtype}, want {wanted}")
        if not (self.data.is_contiguous() and self.scale.is_contiguous()):
            raise ValueError("weights and scales must be contiguous")


MXFP4_SCALES = range(18, 145)
"""Scales that the kernels take, as stored (exponent + 127): times a weight and 2^-16 they are normal bf16 numbers."""


def pack_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> QuantizedWeight:
    """Rearrange a checkpoint's layout once.

    blocks: [experts, rows, depth / 2] uint8, weight 2i in the low nibble of byte i; scales: [experts, rows, depth / 32]
    uint8. In the result 32 weights of a row are four words, as a thread of the tensor cores wants them: word c has
    columns 8j + 2c in nibbles j of its low half, and 8j + 2c + 1 in those of its high half.

    Raises ValueError for scales outside `MXFP4_SCALES`.
    """
    experts, rows, half = blocks.shape
    if half % 32:
        raise ValueError(f"depth {2 * half} is no multiple of 64")
    if int(scales.min()) not in MXFP4_SCALES or int(scales.max()) not in MXFP4_SCALES:
        raise ValueError(f"scales {int(scales.min())} to {int(scales.max())}, want {MXFP4_SCALES}")
    weights = torch.stack([blocks & 15, blocks >> 4], dim=-1).view(experts, rows, half // 32, 2, 4, 4, 2)
    weights = weights.permute(0, 2, 1, 3, 5, 6, 4)  # experts, runs, rows, half of the run, word, odd, nibble
    nibbles = weights.reshape(experts, half // 32, rows, 8, 4, 2)
    packed = (nibbles[..., 0] | (nibbles[..., 1] << 4)).contiguous().view(torch.int32).squeeze(-1)
    pairs = scales.view(experts, rows, half // 32, 2).transpose(1, 2).contiguous().view(torch.int16).squeeze(-1)
    return QuantizedWeight(packed, pairs)


@dataclass(frozen=True)
class QuantizedTiling:
    """How both GEMMs are cut. No choice changes a result's bits while gate_up_n is at least 32 and down_n 64."""

    block_m: int
    gate_up_n: int
    down_n: int
    warps: int
    stages: int
    group_m: int = 8


def choose_quantized_tiling(pairs: int, num_experts: int, mxfp4: bool, hidden: int) -> QuantizedTiling:
    """The tiling for `pairs` pairs over `num_experts` local experts; measured at hidden 2048, 4096 and 7168."""
    if pairs <= 8 or (pairs <= 10 * num_experts and not mxfp4):
        return QuantizedTiling(16, 32, 64, 4, 4)
    if pairs <= 10 * num_experts:
        return QuantizedTiling(16, 128 if pairs >= 2 * num_experts and hidden <= 4096 else 64, 128, 4, 3)
    if pairs <= 20 * num_experts:
        return QuantizedTiling(32, 64, 128 if mxfp4 else 64, 4, 3)
    return QuantizedTiling(64, 64, 128 if mxfp4 else 64, 4, 3)


class QuantizedExperts:
    """As `GroupedExperts`, on quantised weights; bf16 rows in and out."""

    def __init__(
        self,
        w13: QuantizedWeight,
        w2: QuantizedWeight,
        biases: tuple[torch.Tensor, torch.Tensor] | None = None,
        limit: float = 0,
    ) -> None:
        w13.check()
        w2.check()
        experts, double, hidden = w13.shape
        if w2.shape != (experts, hidden, double // 2) or w13.mxfp4 != w2.mxfp4:
            raise ValueError(f"w13 {w13.shape} and w2 {w2.shape} do not belong together")
        check_biases(biases, experts, double, hidden)
        self.w13, self.w2 = w13, w2
        self._bias13, self._bias2 = biases or (w13.scale, w2.scale)  # not read without biases
        self._bias, self._limit = biases is not None, float(limit)
        self.num_experts, self.hidden, self.intermediate = experts, hidden, double // 2
        self._grouper = PairGrouper(experts, w13.data.device)
        self._constants = {"MXFP4": w13.mxfp4, "ASM": isinstance(quantized_down_kernel, triton.JITFunction)}

    def forward(
        self,
        hidden_states: torch.Tensor,
        experts: torch.Tensor,
        rows: torch.Tensor | None = None,
        top_k: int = 1,
        out: torch.Tensor | None = None,
        tiling: QuantizedTiling | None = None,
    ) -> torch.Tensor:
        """See GroupedExperts.forward."""
        pairs = experts.numel()
        if hidden_states.ndim != 2 or hidden_states.shape[1] != self.hidden or hidden_states.stride(1) != 1:
            raise ValueError(f"hidden_states must be [n, {self.hidden}] with contiguous rows")
        if hidden_states.dtype != torch.bfloat16:
            raise ValueError(f"hidden_states are {hidden_states.dtype}, want bfloat16")
        if out is None:
            out = hidden_states.new_empty(pairs, self.hidden)
        if pairs == 0:
            return out
        tiling = tiling or choose_quantized_tiling(pairs, self.num_experts, self.w13.mxfp4, self.hidden)
        grouping = self._grouper.group(experts, rows, top_k, tiling.block_m)
        activations = hidden_states.new_empty(pairs, self.intermediate)
        self.gate_up(hidden_states, grouping, activations, tiling)
        self.down(activations, grouping, out, tiling)
        return out

    def gate_up(self, x: torch.Tensor, grouping: Grouping, activations: torch.Tensor, tiling: QuantizedTiling) -> None:
        """Gate and up product with SwiGLU; activations: [pairs, intermediate] in grouped order."""
        quantized_gate_up_kernel[(grouping.max_tiles * triton.cdiv(self.intermediate, tiling.gate_up_n),)](
            x, x.stride(0), self._descriptor(self.w13, 2, tiling.gate_up_n), self.w13.scale, self._bias13, activations,
            grouping.rows, grouping.tiles, grouping.num_tiles, self.hidden, self.intermediate,
            BLOCK_N=tiling.gate_up_n, BIAS=self._bias, LIMIT=self._limit, **self._launch(tiling),
        )  # fmt: skip

    def down(self, activations: torch.Tensor, grouping: Grouping, out: torch.Tensor, tiling: QuantizedTiling) -> None:
        """Down product; row `pair` of out gets the pair's result."""
        quantized_down_kernel[(grouping.max_tiles * triton.cdiv(self.hidden, tiling.down_n),)](
            activations, self._descriptor(self.w2, 1, tiling.down_n), self.w2.scale, self._bias2, out, out.stride(0),
            grouping.order, grouping.tiles, grouping.num_tiles, self.hidden, self.intermediate,
            BLOCK_N=tiling.down_n, BIAS=self._bias, **self._launch(tiling),
        )  # fmt: skip

    @staticmethod
    def _descriptor(weight: QuantizedWeight, parts: int, block_n: int) -> TensorDescriptor:
        width, step = weight.data.shape[-1], 8 if weight.mxfp4 else FP8_BLOCK.value
        data = weight.data.view(-1, weight.shape[1] // parts, width)
        return TensorDescriptor.from_tensor(data, [parts, block_n, step])

    def _launch(self, tiling: QuantizedTiling) -> dict[str, int | bool]:
        return {
            "BLOCK_M": tiling.block_m, "GROUP_M": tiling.group_m, **self._constants,
            "num_warps": tiling.warps, "num_stages": tiling.stages,
        }  # fmt: skip
