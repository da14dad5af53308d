"""Grouped expert FFN on fp8 (128 x 128 blocks) and MXFP4 weights, which are never materialised in bf16.

The arithmetic: `triton_small_tiles`; with many rows per expert `gluon_quantized_gemm`, of MXFP4 with few
`gluon_mxfp4_tiles`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import triton

from kernels.expert_ffn import PROBE_ROWS, fixed_values
from kernels.quantized_weight import COLUMNS, QuantizedWeight, pack_fp8
from kernels.triton_expert_ffn import check_biases, output_digest
from kernels.triton_grouping import Grouping, PairGrouper
from kernels.triton_small_tiles import Cut, SmallTiles, SmallTiling
from kernels.triton_tiling import FFNTiling, RingTiling, Tiling

gluon_mxfp4_tiles: Any
gluon_quantized_gemm: Any
try:
    from kernels import gluon_mxfp4_tiles, gluon_quantized_gemm
except ImportError:  # a Triton without Gluon for Hopper
    gluon_mxfp4_tiles = gluon_quantized_gemm = None

# For weights that `gluon_quantized_gemm` admits; only stages, group_m and down's block_n are a choice.
WIDE_FP8 = {
    block_m: FFNTiling(block_m, Tiling(128, 128, 4, stages, 16), Tiling(256, 128, 4, stages, 16))
    for block_m, stages in ((64, 4), (128, 3))
}
WIDE_MXFP4 = {
    block_m: FFNTiling(block_m, Tiling(128, 128, 4, stages, 16), Tiling(256, 128, 4, stages, 16))
    for block_m, stages in ((32, 8), (64, 6), (128, 4))
}
"""By tile height."""
NARROW_FP8_DOWN = Tiling(128, 128, 4, 4, 16)
NARROW_MXFP4_DOWN = Tiling(128, 128, 4, 5, 16)
RING = (
    (3, RingTiling(8, 64, 4, 4)),
    (6, RingTiling(16, 128, 4, 4)),
    (17, RingTiling(24, 128, 3, 4)),
    (24, RingTiling(32, 128, 4, 3)),
)
"""For weights that `gluon_mxfp4_tiles` admits, up to so many rows per expert on average."""
RING_ONE_WAVE = RingTiling(8, 64, 5, 3)
"""Where all of gate/up is one wave: more loads under way."""
MULTIPROCESSORS = 132  # of an H100 and an H200


def choose_quantized_tiling(
    pairs: int, num_experts: int, mxfp4: bool, hidden: int, wide: bool = False, ring: bool = False
) -> SmallTiling | FFNTiling | RingTiling:
    """The tiling for `pairs` pairs over `num_experts` local experts; measured at hidden 2048, 4096 and 7168.

    wide: whether `gluon_quantized_gemm` admits the weights; ring: whether `gluon_mxfp4_tiles` does.
    """
    if mxfp4:
        return _choose_mxfp4(pairs, num_experts, hidden, wide, ring)
    mean = pairs / num_experts
    if wide and mean > 20:
        return _choose_wide_fp8(mean, hidden)
    block_m, one_launch = _small_block_m(mean), _one_launch(pairs, num_experts, hidden)
    if mean > 20:
        return SmallTiling(block_m, Cut(64, 128, 3), Cut(64, 128, 3), one_launch=False)
    narrow = mean < 1.5  # also where only experts with pairs are counted
    if one_launch:
        if narrow and hidden > 4096 and mean < 0.5:  # all of gate/up is one wave: more loads under way before down's
            return SmallTiling(block_m, Cut(32, 128, 6), Cut(64, 128, 4))
        return SmallTiling(block_m, Cut(32, 128, 4) if narrow and hidden <= 4096 else Cut(64, 128, 3), Cut(128, 128, 3))
    gate_up = Cut(32, 128, 4) if narrow else Cut(64, 128, 3)
    return SmallTiling(block_m, gate_up, Cut(64, 128, 4) if pairs <= 8 else Cut(128, 128, 3), one_launch=False)


def _small_block_m(mean: float) -> int:
    return 16 if mean <= 10 else 32 if mean <= 20 else 64


def _many_columns(pairs: int, num_experts: int, hidden: int) -> bool:
    """Whether down has two programs or more for each multiprocessor.

    Fewer are better spread by a launch of their own: in one with gate/up they start where those happen to end, several
    to a multiprocessor.
    """
    return min(pairs, num_experts) * hidden > 1 << 15


def _one_launch(pairs: int, num_experts: int, hidden: int) -> bool:
    return pairs <= 20 * num_experts and _many_columns(pairs, num_experts, hidden)


def _choose_mxfp4(
    pairs: int, num_experts: int, hidden: int, wide: bool, ring: bool
) -> SmallTiling | FFNTiling | RingTiling:
    mean = pairs / num_experts
    many = _many_columns(pairs, num_experts, hidden)
    if ring and (found := _choose_ring(mean, hidden, many)):
        return found
    if wide and mean > 10:
        return _choose_wide_mxfp4(pairs, num_experts, hidden)
    return _choose_small_mxfp4(pairs, num_experts, hidden)


def _choose_ring(mean: float, hidden: int, many: bool) -> RingTiling | None:
    if not many:
        return RING[0][1] if 1.5 <= mean <= 4 else None
    if mean < 0.5 and hidden > 4096:
        return RING_ONE_WAVE
    return next((tiling for limit, tiling in RING if mean <= limit), None)


def _choose_wide_fp8(mean: float, hidden: int) -> FFNTiling:
    tiling = WIDE_FP8[64 if mean <= 48 else 128]
    # With tiles of 128 rows a wide block of down is no faster, and its last round of items is emptier.
    return replace(tiling, down=NARROW_FP8_DOWN) if mean > 96 or hidden % 256 else tiling


def _choose_wide_mxfp4(pairs: int, num_experts: int, hidden: int) -> FFNTiling:
    mean = pairs / num_experts
    if mean <= 52:
        return WIDE_MXFP4[32 if mean <= 24 else 64]
    # A narrow item takes 0.55 of the time; in the last round of either, some multiprocessors have none.
    items = (pairs / 128 + num_experts / 2) * hidden / 256
    narrow = 0.55 * math.ceil(2 * items / MULTIPROCESSORS) < math.ceil(items / MULTIPROCESSORS)
    tiling = WIDE_MXFP4[128]
    return replace(tiling, down=NARROW_MXFP4_DOWN) if narrow else tiling


def _choose_small_mxfp4(pairs: int, num_experts: int, hidden: int) -> SmallTiling:
    """Caps let more programs share a multiprocessor, as one waits while another widens."""
    mean = pairs / num_experts
    block_m, one_launch = _small_block_m(mean), _one_launch(pairs, num_experts, hidden)
    if mean > 20:
        return SmallTiling(block_m, Cut(64, 128, 3), Cut(128, 128, 3), one_launch=False, registers=168)
    if mean < 1.5 and min(pairs, num_experts) * hidden < 1 << 16:  # few: how much each has under way counts more
        return SmallTiling(block_m, Cut(32, 256, 3), Cut(64, 256, 3), one_launch=one_launch)
    if not one_launch:
        return SmallTiling(block_m, Cut(64, 128, 3), Cut(128, 256, 3), one_launch=False)
    short = hidden <= 2048 and mean > 2  # programs of few steps, several for each place
    return SmallTiling(block_m, Cut(64, 128, 3), Cut(128, 128, 3), registers=80 if short else None)


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
        self.num_experts, self.hidden, self.intermediate = experts, hidden, double // 2
        self._biases, self._limit = biases, float(limit)
        self._wide: bool = gluon_quantized_gemm is not None and gluon_quantized_gemm.admits(w13, w2)
        self._ring: bool = gluon_mxfp4_tiles is not None and gluon_mxfp4_tiles.admits(w13, w2)
        data = w13.data
        self._claims = torch.zeros(2, dtype=torch.int32, device=data.device)
        self._sms = torch.cuda.get_device_properties(data.device).multi_processor_count if data.is_cuda else 1
        self._grouper = PairGrouper(experts, data.device)
        self._small_tiles = SmallTiles(w13, w2, biases, limit)

    def forward(
        self,
        hidden_states: torch.Tensor,
        experts: torch.Tensor,
        rows: torch.Tensor | None = None,
        top_k: int = 1,
        out: torch.Tensor | None = None,
        tiling: SmallTiling | FFNTiling | RingTiling | None = None,
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
        self.ffn(hidden_states, grouping, activations, out, tiling)
        return out

    def choose_tiling(self, pairs: int, num_experts: int | None = None) -> SmallTiling | FFNTiling | RingTiling:
        """See `choose_quantized_tiling`; num_experts: how many have pairs, where that is known."""
        experts = num_experts or self.num_experts
        return choose_quantized_tiling(pairs, experts, self.w13.mxfp4, self.hidden, self._wide, self._ring)

    def ffn(
        self, x: torch.Tensor, grouping: Grouping, activations: torch.Tensor, out: torch.Tensor,
        tiling: SmallTiling | FFNTiling | RingTiling,
    ) -> None:  # fmt: skip
        """See GroupedExperts.ffn."""
        if isinstance(tiling, SmallTiling):
            self._small_tiles.ffn(x, grouping, activations, out, tiling)
            return
        if isinstance(tiling, RingTiling):
            gluon_mxfp4_tiles.ffn(
                x, self.w13, self.w2, self._biases, self._limit, activations, out, grouping, self._claims, self._sms,
                tiling,
            )  # fmt: skip
            return
        bias13, bias2 = self._biases or (None, None)
        gluon_quantized_gemm.gate_up(
            x, self.w13, bias13, self._limit, activations, grouping, tiling.gate_up, self._sms
        )  # fmt: skip
        gluon_quantized_gemm.down(activations, self.w2, bias2, out, grouping, tiling.down, self._sms)


def fp8_fingerprint(device: torch.device) -> str:
    """As `triton_expert_ffn.numerics_fingerprint`, of an expert with fp8 weights."""
    hidden, inter = 640, 896
    experts = QuantizedExperts(_fixed_fp8(0, 2 * inter, hidden, device), _fixed_fp8(1, hidden, inter, device))
    return output_digest(experts, fixed_values(2, (max(PROBE_ROWS), hidden)) * 16, device)


def _fixed_fp8(stream: int, rows: int, depth: int, device: torch.device) -> QuantizedWeight:
    """Codes of up to 256 whose scales, all different, make of them what `fixed_values` gives."""
    codes = (fixed_values(stream, (rows, depth)) * 4096).to(torch.float8_e4m3fn)
    scale = 1 / 4096 + fixed_values(stream + 10, (rows // COLUMNS, depth // COLUMNS)) / 1024
    packed = pack_fp8(codes[None], scale[None])
    return QuantizedWeight(packed.data.to(device), packed.scale.to(device))


def _stored(depth: int) -> int:
    """A weight's depth as it is stored."""
    return triton.cdiv(depth, COLUMNS) * COLUMNS
