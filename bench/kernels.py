"""Grouped expert FFN on one GPU: ours and every peer found, in one process, interleaved, against the two floors.

    python -m bench.kernels --peers DIR --out results.json

R distinct batches and routings of a cell are captured in one CUDA graph; a pass is the median of a few replays with the L2
flushed, divided by R; a figure is the median of three passes that go round all peers. Byte floor: weights of the touched
experts, rows in and out, over the card's measured read rate. Operation floor: over its sustained bf16 rate.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from bench.kernel_cases import SHAPES, Case, Shape, make_case, reference_error
from bench.kernel_fused_moe import VLLM, SGLang
from bench.kernel_peers import Absent, CublasLoop, DeepGEMM, GroupedMM, Run, TritonKernels
from kernels.triton_combine import combine
from kernels.triton_expert_ffn import GroupedExperts
from kernels.triton_tiling import choose_tiling

ROWS = {"qwen": (1, 8, 64, 256, 1024, 4096, 16384), "mixtral": (1, 8, 64, 256, 1024, 16384),
        "dsv3": (1, 8, 64, 256, 1024, 4096, 16384)}  # fmt: skip
PASSES = 3
PEERS: dict[str, Callable[..., Any]] = {
    "vLLM": VLLM,
    "SGLang": SGLang,
    "triton_kernels": TritonKernels,
    "grouped_mm": GroupedMM,
    "DeepGEMM": DeepGEMM,
    "cuBLAS loop": CublasLoop,
}


class Ours:
    """This repository's kernels behind the interface of a peer."""

    def __init__(self, w13: torch.Tensor, w2: torch.Tensor, directory: Path | None) -> None:
        self.experts = GroupedExperts(w13, w2)

    def variants(self, case: Case) -> Sequence[Any]:
        return [choose_tiling(case.pairs, self.experts.num_experts)]

    def prepare(self, case: Case, variant: Any) -> Run:
        ours, ids = self.experts, case.ids.view(-1)
        grouping = ours._grouper.group(case.experts, case.pair_rows, 1, variant.block_m)
        act = torch.full((case.pairs, ours.intermediate), float("nan"), dtype=torch.bfloat16, device="cuda")
        out = torch.full((case.pairs, ours.hidden), float("nan"), dtype=torch.bfloat16, device="cuda")

        def core() -> None:
            ours.gate_up(case.hidden, grouping, act, variant)
            ours.down(act, grouping, out, variant)

        local = case.pairs == ids.numel()

        def full() -> None:
            rows = ours.forward(case.hidden, ids, top_k=case.shape.top_k, tiling=variant)
            combine(rows, case.weights, None if local else ids)

        return Run(core, lambda: out, full)


@triton.jit
def _read_kernel(source_ptr, sink_ptr, elements, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(tl.program_id(0) * 4 * BLOCK, elements, tl.num_programs(0) * 4 * BLOCK):
        for part in tl.static_range(4):
            total ^= tl.load(source_ptr + start + part * BLOCK + tl.arange(0, BLOCK))
    if tl.sum(total) == 123456789:  # never: the sum keeps the loads alive
        tl.store(sink_ptr, 1)


class Clock:
    """Times CUDA graphs with a cold L2."""

    def __init__(self) -> None:
        self._flush = torch.zeros(1 << 26, dtype=torch.int32, device="cuda")

    def graph(self, calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph

    def replay_us(self, graph: torch.cuda.CUDAGraph, times: int) -> float:
        samples = []
        for _ in range(times):
            self._flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            samples.append(start.elapsed_time(end) * 1e3)
        return statistics.median(samples)


def ceilings(clock: Clock) -> dict[str, float]:
    """The card's read rate (bytes per µs) and bf16 rates (operations per µs), burst and sustained."""
    elements = 1 << 29
    source = torch.randint(0, 100, (elements,), dtype=torch.int32, device="cuda")
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")
    reads = [
        clock.replay_us(
            clock.graph([lambda p=programs, b=block: _read_kernel[(132 * p,)](source, sink, elements, BLOCK=b)]), 5
        )
        for programs, block in ((8, 1024), (4, 2048), (8, 2048))
    ]
    del source
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    burst = clock.replay_us(clock.graph([lambda: a @ b]), 5)
    sustained = clock.replay_us(clock.graph([lambda: a @ b] * 60), 2) / 60
    return {"read": 4 * elements / min(reads), "burst": 2 * 8192**3 / burst, "sustained": 2 * 8192**3 / sustained}


@dataclass
class Entry:
    """One implementation in one cell."""

    name: str
    error: float = float("nan")
    core: torch.cuda.CUDAGraph | None = None
    full: torch.cuda.CUDAGraph | None = None
    runs: list[Run] = field(default_factory=list)  # keeps alive what the graphs read
    core_us: list[float] = field(default_factory=list)
    full_us: list[float] = field(default_factory=list)
    note: str = ""


def enter(
    name: str, peer: Any, cases: Sequence[Case], weights: tuple[torch.Tensor, torch.Tensor], clock: Clock
) -> Entry:
    """Check a peer's rows, pick its fastest variant, capture its graphs."""
    entry, best = Entry(name), float("inf")
    for variant in peer.variants(cases[0]):
        try:
            runs = [peer.prepare(case, variant) for case in cases]
            for run in runs:
                run.core()
            torch.cuda.synchronize()
            error = reference_error(cases[0], *weights, runs[0].rows())
            graph = clock.graph([run.core for run in runs])
            us = clock.replay_us(graph, 3)
        except Exception as failure:  # a peer's tile choice that this card or torch refuses must not end the bench
            entry.note = f"{type(failure).__name__}: {str(failure)[:120]}"
            continue
        if us < best:
            best, entry.core, entry.error, entry.runs = us, graph, error, runs
            full = [run.full for run in runs if run.full is not None]
            try:
                entry.full = clock.graph(full) if len(full) == len(runs) else None
            except Exception as failure:
                entry.note = f"full: {type(failure).__name__}: {str(failure)[:120]}"
    return entry


def measure(
    shape: Shape, rows: int, peers: dict[str, Any], weights: Any, clock: Clock
) -> tuple[list[Entry], list[Case]]:
    """All implementations of one cell, three interleaved passes."""
    batches = max(2, min(16, 512 // rows)) if rows <= 256 else (4 if rows <= 4096 else 2)
    cases = [make_case(shape, rows, seed) for seed in range(1, batches + 1)]
    entries = [enter(name, peer, cases, weights, clock) for name, peer in peers.items()]
    for _ in range(PASSES):
        for entry in entries:
            if entry.core is not None:
                entry.core_us.append(clock.replay_us(entry.core, 5) / batches)
            if entry.full is not None:
                entry.full_us.append(clock.replay_us(entry.full, 5) / batches)
    return entries, cases


def row_of(shape: Shape, rows: int, entries: list[Entry], cases: list[Case], rates: dict[str, float]) -> dict[str, Any]:
    """What one cell says, as plain data."""
    byte_us = statistics.mean(case.bytes_moved for case in cases) / rates["read"]
    operation_us = statistics.mean(case.operations for case in cases) / rates["sustained"]
    cell: dict[str, Any] = {
        "shape": shape.name,
        "rows": rows,
        "byte_floor_us": byte_us,
        "operation_floor_us": operation_us,
    }
    for entry in entries:
        cell[entry.name] = {
            "core_us": statistics.median(entry.core_us) if entry.core_us else None,
            "full_us": statistics.median(entry.full_us) if entry.full_us else None,
            "error": entry.error,
            "note": entry.note,
        }
    return cell


def show(cell: dict[str, Any], names: Sequence[str]) -> str:
    """One line: floors, then core (and full) of each implementation."""
    floor = max(cell["byte_floor_us"], cell["operation_floor_us"])
    parts = [f"{cell['shape']} {cell['rows']:5d} floors {cell['byte_floor_us']:.1f}/{cell['operation_floor_us']:.1f}"]
    for name in names:
        got = cell[name]
        if got["core_us"] is None:
            parts.append(f"{name} - ({got['note'][:60]})")
            continue
        full = "" if got["full_us"] is None else f" full {got['full_us']:.1f}"
        note = f" [{got['note'][:50]}]" if got["note"] else ""
        parts.append(f"{name} {got['core_us']:.1f} ({floor / got['core_us']:.2f}) e{got['error']:.0e}{full}{note}")
    return " | ".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=Path, help="directory with peers' files that are not installed")
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, help="only these row counts")
    parser.add_argument("--only", nargs="+", help="only these implementations")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    options = parser.parse_args(argv)
    clock = Clock()
    rates = ceilings(clock)
    print(f"{torch.cuda.get_device_name()}: read {rates['read'] / 1e6:.2f} TB/s, bf16 burst {rates['burst'] / 1e6:.0f} "
          f"sustained {rates['sustained'] / 1e6:.0f} TFLOP/s", flush=True)  # fmt: skip
    cells = []
    for name in options.shapes:
        shape = SHAPES[name]
        weights = shape.weights()
        peers: dict[str, Any] = {}
        for label, build in {"ours": Ours, **PEERS}.items():
            if options.only and label not in options.only:
                continue
            try:
                peers[label] = build(*weights, options.peers)
            except Absent as reason:
                print(f"{name}: {label} absent: {reason}", flush=True)
        for rows in ROWS[name]:
            if options.rows and rows not in options.rows:
                continue
            cells.append(row_of(shape, rows, *measure(shape, rows, peers, weights, clock), rates))
            print(show(cells[-1], list(peers)), flush=True)
            torch.cuda.empty_cache()
        del peers, weights
    if options.out:
        options.out.write_text(
            json.dumps({"card": torch.cuda.get_device_name(), "rates": rates, "cells": cells}, indent=1)
        )


if __name__ == "__main__":
    main()
