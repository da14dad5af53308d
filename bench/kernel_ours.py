"""This repository's kernels behind the interface of a peer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.kernel_cases import DEVICE, Case
from bench.kernel_peers import Run, poisoned
from bench.kernel_quantized import CheckpointWeight
from kernels.quantized_weight import QuantizedWeight, pack_fp8, pack_mxfp4
from kernels.triton_combine import combine
from kernels.triton_expert_ffn import GroupedExperts
from kernels.triton_grouping import PairGrouper
from kernels.triton_quantized_ffn import QuantizedExperts
from kernels.triton_small_tiles import MAX_PAIRS


class Ours:
    """The bf16 kernels."""

    experts: Any

    def __init__(self, w13: torch.Tensor, w2: torch.Tensor, directory: Path | None) -> None:
        self.experts = GroupedExperts(w13, w2)
        self.grouper = PairGrouper(w13.shape[0], w13.device)

    def variants(self, case: Case) -> Sequence[Any]:
        """The one that forward would take."""
        return [self.experts.choose_tiling(case.pairs)]

    def prepare(self, case: Case, variant: Any) -> Run:
        """Inputs and outputs of one batch, and the calls to time."""
        ours, ids = self.experts, case.ids.view(-1)
        act, out = poisoned(case.pairs, ours.intermediate), poisoned(case.pairs, ours.hidden)
        absent = None if case.pairs == ids.numel() else ids
        core = self.core(case, variant, act, out)

        def full() -> None:
            combine(ours.forward(case.hidden, ids, top_k=case.shape.top_k), case.weights, absent)

        return Run(core, lambda: out, full)

    def core(self, case: Case, variant: Any, act: torch.Tensor, out: torch.Tensor) -> Callable[[], None]:
        """The FFN of listed pairs; those of few pairs need not be grouped."""
        if case.pairs <= MAX_PAIRS:
            return lambda: self.experts.few_pairs(case.hidden, case.experts, case.pair_rows, 1, act, out)
        return self.products(case, variant, act, out)

    def products(self, case: Case, variant: Any, act: torch.Tensor, out: torch.Tensor) -> Callable[[], None]:
        """Both products of grouped pairs."""
        grouping = self.grouper.group(case.experts, case.pair_rows, 1, variant.block_m)
        return lambda: self.experts.ffn(case.hidden, grouping, act, out, variant)


class OursQuantized(Ours):
    """The fp8 and MXFP4 kernels."""

    def __init__(self, w13: CheckpointWeight, w2: CheckpointWeight, directory: Path | None) -> None:
        self.experts = QuantizedExperts(_packed(w13), _packed(w2))
        self.grouper = PairGrouper(self.experts.num_experts, w13.data.device)

    core = Ours.products


def _packed(weight: CheckpointWeight) -> QuantizedWeight:
    return (pack_mxfp4 if weight.mxfp4 else pack_fp8)(weight.data, weight.scale)


class DenseCublas:
    """Not a peer but a ceiling: as many rows through one expert's two products, without an activation."""

    def __init__(self, w13: torch.Tensor, w2: torch.Tensor, directory: Path | None) -> None:
        self.w13, self.w2 = w13[0], w2[0]

    def variants(self, case: Case) -> Sequence[Any]:
        """None where the weights, not the products, decide."""
        return [None] if case.pairs >= 512 * case.shape.local else []

    def prepare(self, case: Case, variant: Any) -> Run:
        """Random activations: the first product's output is not what the second one reads."""
        x = case.hidden[case.pair_rows.long()]
        act = torch.randn(case.pairs, self.w2.shape[1], device=DEVICE, dtype=torch.bfloat16)
        both, out = poisoned(case.pairs, self.w13.shape[0]), poisoned(case.pairs, self.w2.shape[0])

        def core() -> None:
            torch.mm(x, self.w13.T, out=both)
            torch.mm(act, self.w2.T, out=out)

        return Run(core, lambda: torch.full_like(out, float("nan")))
