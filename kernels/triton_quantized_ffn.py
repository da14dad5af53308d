"""Grouped expert FFN on fp8 (128 x 128 blocks) and MXFP4 weights, which are never materialised in bf16."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.expert_ffn import PROBE_ROWS, fixed_values
from kernels.quantized_weight import COLUMNS, QuantizedWeight, pack_fp8
from kernels.triton_expert_ffn import check_biases
from kernels.triton_grouping import Grouping, PairGrouper
from kernels.triton_quantized_gemm import quantized_down_kernel, quantized_gate_up_kernel


@dataclass(frozen=True)
class GemmTiling:
    """How one GEMM is cut: weight rows (of gate, and as many of up) and depth per step; an fp8 step is 128 deep."""

    block_n: int
    block_k: int
    stages: int


@dataclass(frozen=True)
class QuantizedTiling:
    """How both are cut. No choice changes a result's bits while gate/up's block_n is at least 32 and down's 64."""

    block_m: int
    gate_up: GemmTiling
    down: GemmTiling
    group_m: int = 8


def choose_quantized_tiling(pairs: int, num_experts: int, mxfp4: bool, hidden: int) -> QuantizedTiling:
    """The tiling for `pairs` pairs over `num_experts` local experts; measured at hidden 2048, 4096 and 7168."""
    mean = pairs / num_experts
    block_m = 16 if mean <= 10 else 32 if mean <= 20 else 64
    few_programs = min(pairs, num_experts) * hidden <= 50_000 and mean <= 20  # in down: each needs more under way
    down_n = 64 if few_programs and pairs <= 8 else 128
    if not mxfp4:
        # below 1.5 also where only experts with pairs are counted: as few programs as in down
        gate_up = GemmTiling(32, 128, 4) if mean < 1.5 else GemmTiling(64, 128, 3)
        down = GemmTiling(64, 128, 3) if mean > 20 else GemmTiling(down_n, 128, 4 if down_n == 64 else 3)
        return QuantizedTiling(block_m, gate_up, down)
    if pairs <= 8 or mean <= 2:
        gate_up = GemmTiling(32, 256, 3)
    else:
        gate_up = GemmTiling(128 if mean <= 20 else 64, 128, 3)
    return QuantizedTiling(block_m, gate_up, GemmTiling(down_n, 256 if few_programs else 128, 3))


class QuantizedExperts:
    """As `GroupedExperts`, on quantised weights, which too may be overwritten in place; bf16 rows in and out."""

    most_few_pairs = 0  # there is no kernel for few pairs alone

    def __init__(
        self,
        w13: QuantizedWeight,
        w2: QuantizedWeight,
        biases: tuple[torch.Tensor, torch.Tensor] | None = None,
        limit: float = 0,
    ) -> None:
        (experts, double, _), (_, hidden, _) = w13.shape, w2.shape
        wanted = (experts, double, _stored(hidden)), (experts, hidden, _stored(double // 2))
        if (w13.shape, w2.shape) != wanted or w13.mxfp4 != w2.mxfp4:
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
        tiling = tiling or self.choose_tiling(pairs)
        grouping = self._grouper.group(experts, rows, top_k, tiling.block_m)
        activations = hidden_states.new_empty(pairs, self.intermediate)
        self.gate_up(hidden_states, grouping, activations, tiling)
        self.down(activations, grouping, out, tiling)
        return out

    def choose_tiling(self, pairs: int, num_experts: int | None = None) -> QuantizedTiling:
        """See `choose_quantized_tiling`; num_experts: how many have pairs, where that is known."""
        return choose_quantized_tiling(pairs, num_experts or self.num_experts, self.w13.mxfp4, self.hidden)

    def gate_up(self, x: torch.Tensor, grouping: Grouping, activations: torch.Tensor, tiling: QuantizedTiling) -> None:
        """Gate and up product with SwiGLU; activations: [pairs, intermediate] in grouped order."""
        gemm = tiling.gate_up
        quantized_gate_up_kernel[(grouping.max_tiles * triton.cdiv(self.intermediate, gemm.block_n),)](
            x, x.stride(0), *_operands(self.w13, 2, gemm), self._bias13, activations,
            grouping.rows, grouping.tiles, grouping.num_tiles, self.hidden, self.intermediate,
            BIAS=self._bias, LIMIT=self._limit, **self._launch(tiling, gemm),
        )  # fmt: skip

    def down(self, activations: torch.Tensor, grouping: Grouping, out: torch.Tensor, tiling: QuantizedTiling) -> None:
        """Down product; out: see GroupedExperts.down."""
        gemm, out_at = tiling.down, out.dtype == torch.int64
        quantized_down_kernel[(grouping.max_tiles * triton.cdiv(self.hidden, gemm.block_n),)](
            activations, *_operands(self.w2, 1, gemm), self._bias2, out, self.hidden if out_at else out.stride(0),
            grouping.order, grouping.tiles, grouping.num_tiles, self.hidden, self.intermediate,
            BIAS=self._bias, OUT_AT=out_at, **self._launch(tiling, gemm),
        )  # fmt: skip

    def _launch(self, tiling: QuantizedTiling, gemm: GemmTiling) -> dict[str, int | bool]:
        return {
            "BLOCK_M": tiling.block_m, "GROUP_M": tiling.group_m, "BLOCK_N": gemm.block_n, "BLOCK_K": gemm.block_k,
            "num_warps": 4, "num_stages": gemm.stages, **self._constants,
        }  # fmt: skip


def fp8_fingerprint(device: torch.device) -> str:
    """As `triton_expert_ffn.numerics_fingerprint`, of an expert with fp8 weights."""
    hidden, inter = 640, 896
    experts = QuantizedExperts(_fixed_fp8(0, 2 * inter, hidden, device), _fixed_fp8(1, hidden, inter, device))
    x = (fixed_values(2, (max(PROBE_ROWS), hidden)) * 16).to(device, torch.bfloat16)
    digest = hashlib.blake2b(digest_size=16)
    for rows in PROBE_ROWS:
        ids = torch.zeros(rows, dtype=torch.int32, device=device)
        digest.update(experts.forward(x[:rows], ids).float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _fixed_fp8(stream: int, rows: int, depth: int, device: torch.device) -> QuantizedWeight:
    """Codes of up to 256 whose scales, all different, make of them what `fixed_values` gives."""
    codes = (fixed_values(stream, (rows, depth)) * 4096).to(torch.float8_e4m3fn)
    scale = 1 / 4096 + fixed_values(stream + 10, (rows // COLUMNS, depth // COLUMNS)) / 1024
    packed = pack_fp8(codes[None], scale[None])
    return QuantizedWeight(packed.data.to(device), packed.scale.to(device))


def _stored(depth: int) -> int:
    """A weight's depth as it is stored."""
    return triton.cdiv(depth, COLUMNS) * COLUMNS


def _operands(
    weight: QuantizedWeight, parts: int, gemm: GemmTiling
) -> tuple[TensorDescriptor, TensorDescriptor | torch.Tensor]:
    """A GEMM's weights and scales for a kernel whose tiles have rows of `parts` matrices."""
    rows, words = weight.shape[1] // parts, weight.data.shape[-1]
    block = [parts * gemm.block_k // COLUMNS, gemm.block_n]
    data = TensorDescriptor.from_tensor(weight.data.view(-1, rows, words), [*block, words])
    if weight.mxfp4:
        return data, TensorDescriptor.from_tensor(weight.scale.view(-1, rows), block)
    return data, weight.scale
