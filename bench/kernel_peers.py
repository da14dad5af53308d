"""Adapters to the grouped expert FFNs that others wrote, as far as this machine has them.

A peer is built for one pair of weights and raises `Absent` with the reason. `prepare(case, variant)` returns what to
time. The core of every peer is two GEMMs and the activation on rows grouped beforehand; `full` goes from ids to
combined rows. Peers without a fused activation get one Triton kernel for it. None of their files are in this
repository.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from bench.kernel_cases import DEVICE, Case


class Absent(Exception):
    """The peer is not on this machine."""


@dataclass(frozen=True)
class Run:
    """core() computes; rows() then gives the local pairs' rows in pair order; full() goes from ids to combined rows."""

    core: Callable[[], object]
    rows: Callable[[], torch.Tensor]
    full: Callable[[], object] | None = None


@triton.jit
def _silu_mul_kernel(x_ptr, out_ptr, half, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < half
    gate = tl.load(x_ptr + row * 2 * half + column, mask=mask).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * half + half + column, mask=mask).to(tl.float32)
    tl.store(out_ptr + row * half + column, (gate / (1 + tl.exp(-gate)) * up).to(tl.bfloat16), mask=mask)


def silu_mul(x: torch.Tensor, out: torch.Tensor) -> None:
    """out = silu(first half of x) * second half, row by row."""
    rows, half = out.shape
    _silu_mul_kernel[(rows, triton.cdiv(half, 1024))](x, out, half, BLOCK=1024)


def poisoned(*shape: int) -> torch.Tensor:
    """A bf16 tensor of NaN, so that what a kernel leaves out shows."""
    return torch.full(shape, float("nan"), dtype=torch.bfloat16, device=DEVICE)


def interleaved(w13: torch.Tensor) -> torch.Tensor:
    """[experts, gate rows then up rows, any] with gate and up in turn, as kernels with a fused activation want it."""
    return w13.view(w13.shape[0], 2, -1, w13.shape[2]).transpose(1, 2).reshape(w13.shape).contiguous()


class CublasLoop:
    """One cuBLAS product per expert and GEMM, on rows sorted beforehand."""

    def __init__(self, w13: torch.Tensor, w2: torch.Tensor, directory: Path | None) -> None:
        self.w13, self.w2 = w13, w2

    def variants(self, case: Case) -> Sequence[Any]:
        """Tile choices to try; the fastest counts."""
        return [None]

    def prepare(self, case: Case, variant: Any) -> Run:
        """Inputs and outputs of one batch, and the calls to time."""
        x = case.hidden[case.pair_rows.long()[case.order]]
        both, act = poisoned(case.pairs, self.w13.shape[1]), poisoned(case.pairs, self.w2.shape[2])
        out = poisoned(case.pairs, self.w2.shape[1])

        def core() -> None:
            self._products(x, self.w13, both, case.counts)
            silu_mul(both, act)
            self._products(act, self.w2, out, case.counts)

        return Run(core, lambda: _unsort(out, case))

    @staticmethod
    def _products(x: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, counts: list[int]) -> None:
        start = 0
        for expert, count in enumerate(counts):
            if count:
                torch.mm(x[start : start + count], weights[expert].T, out=out[start : start + count])
            start += count


def _unsort(rows: torch.Tensor, case: Case) -> torch.Tensor:
    result = torch.empty_like(rows)
    result[case.order] = rows
    return result


class GroupedMM:
    """torch.nn.functional.grouped_mm."""

    def __init__(self, w13: torch.Tensor, w2: torch.Tensor, directory: Path | None) -> None:
        if not hasattr(torch.nn.functional, "grouped_mm"):
            raise Absent("this torch has no grouped_mm")
        self.w13, self.w2 = w13.transpose(1, 2), w2.transpose(1, 2)

    def variants(self, case: Case) -> Sequence[Any]:
        """Tile choices to try; the fastest counts."""
        return [None]

    def prepare(self, case: Case, variant: Any) -> Run:
        """Inputs and outputs of one batch, and the calls to time."""
        x = case.hidden[case.pair_rows.long()[case.order]]
        ends = torch.tensor(case.counts, device=DEVICE).cumsum(0).to(torch.int32)
        act = poisoned(case.pairs, self.w2.shape[1])
        result: list[torch.Tensor] = []

        def core() -> None:
            silu_mul(torch.nn.functional.grouped_mm(x, self.w13, offs=ends), act)
            result[:] = [torch.nn.functional.grouped_mm(act, self.w2, offs=ends)]

        return Run(core, lambda: _unsort(result[0], case))


class TritonKernels:
    """triton_kernels' matmul_ogs with the activation fused (its own module, or the copy that vLLM ships)."""

    def __init__(self, w13: torch.Tensor, w2: torch.Tensor, directory: Path | None) -> None:
        self._import(directory)
        self.choices: dict[Any, Any] = {None: ((interleaved(w13).transpose(1, 2), None), (w2.transpose(1, 2), None))}

    def _import(self, directory: Path | None) -> None:
        if directory is not None and str(directory) not in sys.path:
            sys.path.insert(0, str(directory))
        try:
            matmul_ogs, specialize, tensor = (
                importlib.import_module(f"triton_kernels.{name}") for name in ("matmul_ogs", "specialize", "tensor")
            )
        except ImportError as error:
            raise Absent(str(error)) from error
        self.ogs, self.tensor = matmul_ogs, tensor
        self.activation = matmul_ogs.FusedActivation(specialize.FnSpecs("silu", _silu_pairs, (), reduction_n=2), ())

    def variants(self, case: Case) -> Sequence[Any]:
        """Weight layouts to try; the fastest counts."""
        return list(self.choices)

    def prepare(self, case: Case, variant: Any) -> Run:
        """Inputs and outputs of one batch, and the calls to time."""
        (w13, precision13), (w2, precision2) = self.choices[variant]
        counts = torch.tensor(case.counts, dtype=torch.int32, device=DEVICE)
        ragged = self.tensor.make_ragged_tensor_metadata(counts, case.pairs)
        routing = self.ogs.RoutingData(None, ragged.block_sizes if hasattr(ragged, "block_sizes") else counts,
                                       len(case.counts), 1, ragged)  # fmt: skip
        rows = case.pair_rows[case.order].contiguous()
        gather = self.ogs.GatherIndx(rows, rows)
        result: list[torch.Tensor] = []

        def core() -> None:
            act = self.ogs.matmul_ogs(case.hidden, w13, None, routing, gather_indx=gather,
                                      precision_config=precision13, fused_activation=self.activation)  # fmt: skip
            result[:] = [self.ogs.matmul_ogs(act, w2, None, routing, precision_config=precision2)]

        return Run(core, lambda: _unsort(result[0].view(case.pairs, -1), case))


@triton.jit
def _silu_pairs(x):
    gate, up = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return gate / (1 + tl.exp(-gate)) * up


class DeepGEMM:
    """DeepGEMM's contiguous grouped bf16 GEMM on rows sorted and padded beforehand."""

    def __init__(self, w13: torch.Tensor, w2: torch.Tensor, directory: Path | None) -> None:
        if directory is not None and str(directory) not in sys.path:
            sys.path.insert(0, str(directory))
        try:
            deep_gemm = importlib.import_module("deep_gemm")
        except Exception as error:
            raise Absent(str(error)) from error
        self.gemm = deep_gemm.m_grouped_bf16_gemm_nt_contiguous
        self.align = deep_gemm.get_mk_alignment_for_contiguous_layout()
        self.w13, self.w2 = w13, w2

    def variants(self, case: Case) -> Sequence[Any]:
        """Tile choices to try; the fastest counts."""
        return [None]

    def prepare(self, case: Case, variant: Any) -> Run:
        """Inputs and outputs of one batch, and the calls to time."""
        padded = [-(-count // self.align) * self.align for count in case.counts]
        group = torch.full((sum(padded),), -1, dtype=torch.int32)
        place = torch.empty(case.pairs, dtype=torch.int64)
        start = done = 0
        for expert, count in enumerate(case.counts):
            group[start : start + count] = expert
            place[done : done + count] = torch.arange(start, start + count)
            start, done = start + padded[expert], done + count
        group, place = group.to(DEVICE), place.to(DEVICE)
        x = torch.zeros(sum(padded), case.hidden.shape[1], dtype=torch.bfloat16, device=DEVICE)
        x[place] = case.hidden[case.pair_rows.long()[case.order]]
        both, act = poisoned(sum(padded), self.w13.shape[1]), poisoned(sum(padded), self.w2.shape[2])
        out = poisoned(sum(padded), self.w2.shape[1])

        def core() -> None:
            self.gemm(x, self.w13, both, group)
            silu_mul(both, act)
            self.gemm(act, self.w2, out, group)

        return Run(core, lambda: _unsort(out[place], case))
