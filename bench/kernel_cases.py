"""Shapes, random routings and byte/operation floors of the kernel bench."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU times nothing, but tests run the adapters there
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """An MoE layer: `local` experts of `experts` live on the card."""

    name: str
    hidden: int
    intermediate: int
    local: int
    experts: int
    top_k: int

    def weights(self, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """w13 [local, 2 * intermediate, hidden] and w2 [local, hidden, intermediate]; rows keep their size."""
        generator = torch.Generator(DEVICE).manual_seed(seed)
        w13 = torch.empty(self.local, 2 * self.intermediate, self.hidden, dtype=DTYPE, device=DEVICE)
        w2 = torch.empty(self.local, self.hidden, self.intermediate, dtype=DTYPE, device=DEVICE)
        for expert in range(self.local):
            w13[expert].normal_(0, self.hidden**-0.5, generator=generator)
            w2[expert].normal_(0, self.intermediate**-0.5, generator=generator)
        return w13, w2


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen", 2048, 768, 128, 128, 8),
        Shape("mixtral", 4096, 14336, 8, 8, 2),
        Shape("dsv3", 7168, 2048, 32, 256, 8),
    )
}


@dataclass(frozen=True)
class Case:
    """One batch: hidden [rows, hidden]; ids [rows, top_k] int32, local index or -1; weights [rows, top_k] float32.

    experts, pair_rows [pairs] int32: expert and row of each *local* pair; slots [pairs] int64: its place in
    ids.view(-1); order [pairs] int64 sorts the pairs by expert; counts [local]: pairs per expert, on the host.
    """

    shape: Shape
    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    experts: torch.Tensor
    pair_rows: torch.Tensor
    slots: torch.Tensor
    order: torch.Tensor
    counts: list[int]

    @property
    def pairs(self) -> int:
        """Local pairs."""
        return self.experts.numel()

    def bytes_moved(self, w13: Any, w2: Any) -> float:
        """Weights of the touched experts once, as they are stored, rows in and unsummed rows out."""
        touched = sum(1 for count in self.counts if count)
        rows = 2 * (self.hidden.numel() + self.pairs * self.shape.hidden)
        return touched * (w13.nbytes + w2.nbytes) / self.shape.local + rows

    @property
    def operations(self) -> int:
        """Multiplications and additions of the three products."""
        return 6 * self.pairs * self.shape.hidden * self.shape.intermediate


def make_case(shape: Shape, rows: int, seed: int) -> Case:
    """A random batch with uniform routing; seeds whose batch has no local pair are skipped."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    hidden = torch.randn(rows, shape.hidden, generator=generator, device=DEVICE, dtype=DTYPE)
    scores = torch.rand(rows, shape.experts, generator=generator, device=DEVICE)
    ids = scores.topk(shape.top_k, dim=1).indices.to(torch.int32)
    ids = torch.where(ids < shape.local, ids, -1).contiguous()
    weights = torch.rand(rows, shape.top_k, generator=generator, device=DEVICE)
    slots = (ids.view(-1) >= 0).nonzero().view(-1)
    if slots.numel() == 0:
        return make_case(shape, rows, seed + 10_000)
    experts = ids.view(-1)[slots].contiguous()
    counts = torch.bincount(experts, minlength=shape.local).tolist()
    pair_rows = (slots // shape.top_k).to(torch.int32)
    return Case(shape, hidden, ids, weights, experts, pair_rows, slots, experts.argsort(stable=True), counts)


def reference_error(case: Case, w13: Any, w2: Any, pair_rows: torch.Tensor, sample: int = 24) -> float:
    """Largest relative error, per row in the 2-norm, against fp64, over a spread of the local pairs. NaN stays NaN.

    w13[expert] and w2[expert] are the dense weights, however they are stored.
    """
    worst = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for pair in range(0, case.pairs, max(case.pairs // sample, 1)):
        expert, row = int(case.experts[pair]), int(case.pair_rows[pair])
        gate, up = (w13[expert].double() @ case.hidden[row].double()).chunk(2)
        expected = w2[expert].double() @ (torch.nn.functional.silu(gate) * up)
        worst = torch.maximum(worst, (pair_rows[pair].double() - expected).norm() / expected.norm())
    return float(worst)
