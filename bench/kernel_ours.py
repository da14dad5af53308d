"""This repository's kernels behind the interface of a peer, and the quantised ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.kernel_cases import Case, Shape
from bench.kernel_peers import Run, poisoned
from kernels.triton_combine import combine
from kernels.triton_expert_ffn import GroupedExperts
from kernels.triton_grouping import PairGrouper
from kernels.triton_quantized_ffn import QuantizedExperts, QuantizedWeight, choose_quantized_tiling
from kernels.triton_tiling import choose_tiling


class Ours:
    """The bf16 kernels."""

    def __init__(self, w13: torch.Tensor, w2: torch.Tensor, directory: Path | None) -> None:
        self.experts = GroupedExperts(w13, w2)
        self.grouper = PairGrouper(w13.shape[0], w13.device)

    def variants(self, case: Case) -> Sequence[Any]:
        """The one that forward would take."""
        return [choose_tiling(case.pairs, self.experts.num_experts)]

    def prepare(self, case: Case, variant: Any) -> Run:
        """Inputs and outputs of one batch, and the calls to time."""
        ours, ids = self.experts, case.ids.view(-1)
        grouping = self.grouper.group(case.experts, case.pair_rows, 1, variant.block_m)
        act, out = poisoned(case.pairs, ours.intermediate), poisoned(case.pairs, ours.hidden)
        absent = None if case.pairs == ids.numel() else ids

        def core() -> None:
            ours.gate_up(case.hidden, grouping, act, variant)
            ours.down(act, grouping, out, variant)

        def full() -> None:
            combine(ours.forward(case.hidden, ids, top_k=case.shape.top_k), case.weights, absent)

        return Run(core, lambda: out, full)


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
        act = torch.randn(case.pairs, self.w2.shape[1], device="cuda", dtype=torch.bfloat16)
        both, out = poisoned(case.pairs, self.w13.shape[0]), poisoned(case.pairs, self.w2.shape[0])

        def core() -> None:
            torch.mm(x, self.w13.T, out=both)
            torch.mm(act, self.w2.T, out=out)

        return Run(core, lambda: torch.full_like(out, float("nan")))


def quantized(shape: Shape, kind: str) -> QuantizedExperts:
    """Random fp8 or MXFP4 experts of a shape."""

    def weight(rows: int, depth: int) -> QuantizedWeight:
        if kind == "mxfp4":
            data = torch.randint(0, 256, (shape.local, depth // 64, rows, 32), dtype=torch.uint8, device="cuda")
            scale = torch.randint(118, 122, (shape.local, depth // 64, rows, 2), dtype=torch.uint8, device="cuda")
            return QuantizedWeight(data.view(torch.int32), scale.view(torch.int16).squeeze(-1))
        data = torch.empty(shape.local, rows, depth, dtype=torch.float8_e4m3fn, device="cuda")
        for expert in range(shape.local):
            data[expert] = torch.randn(rows, depth, device="cuda", dtype=torch.bfloat16).to(torch.float8_e4m3fn)
        scale = torch.rand(shape.local, rows // 128, depth // 128, device="cuda") * depth**-0.5
        return QuantizedWeight(data, scale)

    return QuantizedExperts(weight(2 * shape.intermediate, shape.hidden), weight(shape.hidden, shape.intermediate))


def quantized_run(experts: QuantizedExperts, case: Case) -> Run:
    """What to time of one batch; the full path sums nothing."""
    tiling = choose_quantized_tiling(case.pairs, experts.num_experts, experts.w13.mxfp4, experts.hidden)
    grouping = PairGrouper(experts.num_experts, case.hidden.device).group(
        case.experts, case.pair_rows, 1, tiling.block_m
    )
    act, out = poisoned(case.pairs, experts.intermediate), poisoned(case.pairs, experts.hidden)

    def core() -> None:
        experts.gate_up(case.hidden, grouping, act, tiling)
        experts.down(act, grouping, out, tiling)

    return Run(core, lambda: out)


def quantized_bytes(experts: QuantizedExperts, case: Case) -> float:
    """Byte floor of a batch: data and scales of the touched experts, rows in and out."""
    tensors = (experts.w13.data, experts.w13.scale, experts.w2.data, experts.w2.scale)
    return case.touched * sum(t.nbytes for t in tensors) / experts.num_experts + case.row_bytes
