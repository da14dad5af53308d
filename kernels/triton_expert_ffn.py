"""Grouped expert FFN of a server's local experts on a GPU, bf16, batch-invariant.

See `triton_grouping` (which tile holds which pairs); the arithmetic: `triton_small_tiles` (few rows per expert),
`triton_grouped_gemm` (many), `gluon_dense_tiles` (some dozens, on Hopper), `gluon_grouped_gemm` (many, on Hopper);
docs/kernels.md (design, figures).
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.expert_ffn import PROBE_ROWS, fixed_values
from kernels.triton_grouped_gemm import down_kernel, gate_up_kernel
from kernels.triton_grouping import Grouping, PairGrouper
from kernels.triton_small_tiles import MAX_PAIRS, SmallTiles, SmallTiling
from kernels.triton_tiling import DenseTiling, FFNTiling, Tiling, choose_tiling

gluon_dense_tiles: Any
gluon_grouped_gemm: Any
try:
    from kernels import gluon_dense_tiles, gluon_grouped_gemm
except ImportError:  # a Triton without Gluon for Hopper
    gluon_dense_tiles = gluon_grouped_gemm = None


class GroupedExperts:
    """The local experts' weights and their forward.

    w13: [experts, 2 * intermediate, hidden], gate above up; w2: [experts, hidden, intermediate]; both contiguous.
    They are used in place: overwriting an expert's slice (with the stream ordered) replaces the expert.
    biases: [experts, 2 * intermediate] and [experts, hidden], added after the products; limit: 0 for SwiGLU, else the
    clamp of gpt-oss's activation.
    """

    most_few_pairs = MAX_PAIRS  # that `few_pairs` takes

    def __init__(
        self,
        w13: torch.Tensor,
        w2: torch.Tensor,
        biases: tuple[torch.Tensor, torch.Tensor] | None = None,
        limit: float = 0,
    ) -> None:
        experts, double, hidden = w13.shape
        if w2.shape != (experts, hidden, double // 2) or double % 2:
            raise ValueError(f"w13 {tuple(w13.shape)} and w2 {tuple(w2.shape)} do not belong together")
        if not (w13.is_contiguous() and w2.is_contiguous()) or w13.dtype != w2.dtype or w13.device != w2.device:
            raise ValueError("w13 and w2 must be contiguous, of one dtype, on one device")
        if hidden % 8 or w2.shape[2] % 8:
            raise ValueError("hidden and intermediate must be multiples of 8 (TMA moves 16 bytes)")
        check_biases(biases, experts, double, hidden)
        self.w13, self.w2 = w13, w2
        self._biases = biases
        self._bias13, self._bias2 = biases or (w13, w2)  # not read without biases
        self._bias, self._limit = biases is not None, float(limit)
        self.num_experts, self.hidden, self.intermediate = experts, hidden, double // 2
        self._grouper = PairGrouper(experts, w13.device)
        self._small_tiles = SmallTiles(w13, w2, biases, limit)
        self._ping_pong: bool = gluon_grouped_gemm is not None and gluon_grouped_gemm.admits(w13, w2)
        self._dense: bool = gluon_dense_tiles is not None and gluon_dense_tiles.admits(w13, w2)
        self._sms = torch.cuda.get_device_properties(w13.device).multi_processor_count if w13.is_cuda else 1

    def choose_tiling(self, pairs: int, num_experts: int | None = None) -> FFNTiling | SmallTiling | DenseTiling:
        """See `triton_tiling.choose_tiling`; num_experts: how many have pairs, where that is known."""
        return choose_tiling(pairs, num_experts or self.num_experts, self._ping_pong, self._dense)

    def forward(
        self,
        hidden_states: torch.Tensor,
        experts: torch.Tensor,
        rows: torch.Tensor | None = None,
        top_k: int = 1,
        out: torch.Tensor | None = None,
        tiling: FFNTiling | SmallTiling | DenseTiling | None = None,
    ) -> torch.Tensor:
        """One unsummed row per (row, expert) pair; runs on the current stream, without synchronising.

        hidden_states: [n, hidden], rows contiguous.  experts: [pairs] int32, local index, -1 for none (that row of the
        result is left as it was).  rows: [pairs] int32, None when pair i reads row i // top_k. Returns [pairs, hidden].
        """
        pairs = experts.numel()
        self._check(hidden_states, experts, rows)
        if out is None:
            out = hidden_states.new_empty(pairs, self.hidden)
        if pairs == 0:
            return out
        activations = hidden_states.new_empty(pairs, self.intermediate)
        if tiling is None and pairs <= MAX_PAIRS:
            self.few_pairs(hidden_states, experts, rows, top_k, activations, out)
            return out
        tiling = tiling or self.choose_tiling(pairs)
        grouping = self._grouper.group(experts, rows, top_k, tiling.block_m)
        self.ffn(hidden_states, grouping, activations, out, tiling)
        return out

    def few_pairs(
        self, x: torch.Tensor, experts: torch.Tensor, rows: torch.Tensor | None, top_k: int,
        activations: torch.Tensor, out: torch.Tensor,
    ) -> None:  # fmt: skip
        """Everything for up to MAX_PAIRS pairs, in one launch; experts, rows, top_k: see `forward`, the others: `ffn`.

        Calls share counters: they must follow each other, on one stream.
        """
        self._small_tiles.few_pairs(x, experts, rows, top_k, activations, out)

    def ffn(
        self, x: torch.Tensor, grouping: Grouping, activations: torch.Tensor, out: torch.Tensor,
        tiling: FFNTiling | SmallTiling | DenseTiling,
    ) -> None:  # fmt: skip
        """Both products, SwiGLU between them; row `pair` of out gets the pair's result.

        activations: [pairs, intermediate], for the values between them.  out: [pairs, hidden]; or [1] int64, the
        address of such rows, bf16 and contiguous, anywhere that the GPU can write. Calls that share a grouping must
        follow each other.
        """
        if isinstance(tiling, SmallTiling):
            self._small_tiles.ffn(x, grouping, activations, out, tiling)
        elif isinstance(tiling, DenseTiling):
            bias13, bias2 = self._biases or (None, None)
            gluon_dense_tiles.gate_up(x, self.w13, bias13, self._limit, activations, grouping, tiling, self._sms)
            gluon_dense_tiles.down(activations, self.w2, bias2, out, grouping, tiling, self._sms)
        else:
            self._gate_up(x, grouping, activations, tiling)
            self._down(activations, grouping, out, tiling)

    def _gate_up(self, x: torch.Tensor, grouping: Grouping, activations: torch.Tensor, tiling: FFNTiling) -> None:
        cut = tiling.gate_up
        if cut.ping_pong:
            bias = self._biases[0] if self._biases else None
            gluon_grouped_gemm.gate_up(x, self.w13, bias, self._limit, activations, grouping, cut, self._sms)
            return
        weights = self.w13.view(-1, self.intermediate, self.hidden)
        gate_up_kernel[self._grid(grouping, self.intermediate, cut)](
            x, x.stride(0), TensorDescriptor.from_tensor(weights, [2, cut.block_n, cut.block_k]),
            self._bias13, activations, grouping.rows, grouping.tiles, grouping.num_tiles,
            self.hidden, self.intermediate, EVEN_K=self.hidden % cut.block_k == 0, LIMIT=self._limit,
            **self._constants(tiling, cut),
        )  # fmt: skip

    def _down(self, activations: torch.Tensor, grouping: Grouping, out: torch.Tensor, tiling: FFNTiling) -> None:
        cut, out_at = tiling.down, out.dtype == torch.int64
        if cut.ping_pong:
            bias = self._biases[1] if self._biases else None
            gluon_grouped_gemm.down(activations, self.w2, bias, out, grouping, cut, self._sms)
            return
        weights = self.w2.view(-1, self.intermediate)
        down_kernel[self._grid(grouping, self.hidden, cut)](
            TensorDescriptor.from_tensor(activations, [tiling.block_m, cut.block_k]),
            TensorDescriptor.from_tensor(weights, [cut.block_n, cut.block_k]), self._bias2, out,
            self.hidden if out_at else out.stride(0), grouping.order, grouping.tiles, grouping.num_tiles,
            self.hidden, self.intermediate, SWAP=cut.swap, OUT_AT=out_at, **self._constants(tiling, cut),
        )  # fmt: skip

    def _grid(self, grouping: Grouping, columns: int, cut: Tiling) -> tuple[int]:
        items = grouping.max_tiles * triton.cdiv(columns, cut.block_n)
        return (min(items, self._sms * cut.programs_per_sm),)

    def _constants(self, tiling: FFNTiling, cut: Tiling) -> dict[str, Any]:
        return {
            "BLOCK_M": tiling.block_m, "BLOCK_N": cut.block_n, "BLOCK_K": cut.block_k, "GROUP_M": cut.group_m,
            "BIAS": self._bias, "num_warps": cut.warps, "num_stages": cut.stages,
        }  # fmt: skip

    def _check(self, hidden_states: torch.Tensor, experts: torch.Tensor, rows: torch.Tensor | None) -> None:
        if hidden_states.ndim != 2 or hidden_states.shape[1] != self.hidden or hidden_states.stride(1) != 1:
            raise ValueError(f"hidden_states must be [n, {self.hidden}] with contiguous rows")
        if hidden_states.dtype != self.w13.dtype:
            raise ValueError(f"hidden_states are {hidden_states.dtype}, the weights {self.w13.dtype}")
        for name, ids in (("experts", experts), ("rows", rows)):
            if ids is not None and (
                ids.dtype != torch.int32 or not ids.is_contiguous() or ids.numel() != experts.numel()
            ):
                raise ValueError(f"{name} must be a contiguous int32 tensor with one entry per pair")


def numerics_fingerprint(device: torch.device) -> str:
    """Hash of a fixed expert's output at 1, 2, 5 and 64 rows: equal where results can replace each other bit by bit."""
    hidden, inter = 576, 800
    gate, up, down = (fixed_values(i, (inter, hidden)) for i in range(3))
    w13, w2 = torch.cat((gate, up))[None], down.T.contiguous()[None]
    experts = GroupedExperts(w13.to(device, torch.bfloat16), w2.to(device, torch.bfloat16))
    return output_digest(experts, fixed_values(3, (max(PROBE_ROWS), hidden)) * 16, device)


def output_digest(experts: Any, rows: torch.Tensor, device: torch.device) -> str:
    """Hash of expert 0's output at the first 1, 2, 5 and 64 of `rows` [64, hidden], by the `forward` of `experts`."""
    x = rows.to(device, torch.bfloat16)
    digest = hashlib.blake2b(digest_size=16)
    for count in PROBE_ROWS:
        ids = torch.zeros(count, dtype=torch.int32, device=device)
        digest.update(experts.forward(x[:count], ids).float().cpu().numpy().tobytes())
    return digest.hexdigest()


def check_biases(biases: tuple[torch.Tensor, torch.Tensor] | None, experts: int, double: int, hidden: int) -> None:
    """Raise ValueError unless biases are None or contiguous [experts, double] and [experts, hidden]."""
    for bias, columns in zip(biases or (), (double, hidden), strict=False):
        if bias.shape != (experts, columns) or not bias.is_contiguous():
            raise ValueError(f"a bias of shape {tuple(bias.shape)}, want contiguous {(experts, columns)}")
