"""Grouped expert FFN on one GPU: ours and every peer found, in one process, interleaved, against the two floors.

    python -m bench.kernels --peers DIR --out results.json

R distinct batches and routings of a cell are captured in one CUDA graph; a pass is the median of a few replays with the
L2 flushed, divided by R; a figure is the median of three passes that go round all peers, each from another one on.
Byte floor: weights of the touched experts as they are stored, rows in and out, over the card's measured read rate.
Operation floor: over its sustained bf16 rate, also for fp8 and MXFP4 weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.kernel_cases import SHAPES, Case, Shape, make_case, reference_error
from bench.kernel_clock import Clock, ceilings
from bench.kernel_fused_moe import VLLM, SGLang
from bench.kernel_ours import DenseCublas, Ours, OursQuantized
from bench.kernel_peers import Absent, CublasLoop, DeepGEMM, GroupedMM, Run, TritonKernels
from bench.kernel_quantized import TritonKernelsMXFP4, VLLMFp8, quantized_weights

ROWS = {"qwen": (1, 8, 64, 256, 1024, 4096, 16384), "mixtral": (1, 8, 64, 256, 1024, 16384),
        "dsv3": (1, 8, 64, 256, 1024, 4096, 16384)}  # fmt: skip
PASSES = 3
QUANTIZED_ROWS = (1, 8, 64, 256, 1024, 4096)
IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {
    "bf16": {
        "ours": Ours,
        "vLLM": VLLM,
        "SGLang": SGLang,
        "triton_kernels": TritonKernels,
        "grouped_mm": GroupedMM,
        "DeepGEMM": DeepGEMM,
        "cuBLAS loop": CublasLoop,
        "dense cuBLAS": DenseCublas,
    },
    "fp8": {"ours": OursQuantized, "vLLM": VLLMFp8},
    "mxfp4": {"ours": OursQuantized, "triton_kernels": TritonKernelsMXFP4},
}


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


def enter(name: str, peer: Any, cases: Sequence[Case], weights: tuple[Any, Any], clock: Clock) -> Entry:
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
    for n in range(PASSES):
        first = n * len(entries) // PASSES  # long products get the power that those before them leave
        for entry in entries[first:] + entries[:first]:
            if entry.core is not None:
                entry.core_us.append(clock.replay_us(entry.core, 5) / batches)
            if entry.full is not None:
                entry.full_us.append(clock.replay_us(entry.full, 5) / batches)
    return entries, cases


def row_of(
    shape: Shape, kind: str, weights: tuple[Any, Any], entries: list[Entry], cases: list[Case], rates: dict[str, float]
) -> dict[str, Any]:
    """What one cell says, as plain data."""
    byte_us = statistics.mean(case.bytes_moved(*weights) for case in cases) / rates["read"]
    operation_us = statistics.mean(case.operations for case in cases) / rates["sustained"]
    cell: dict[str, Any] = {
        "shape": shape.name,
        "weights": kind,
        "rows": cases[0].hidden.shape[0],
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
    parts = [f"{cell['weights']} {cell['shape']} {cell['rows']:5d} "
             f"floors {cell['byte_floor_us']:.1f}/{cell['operation_floor_us']:.1f}"]  # fmt: skip
    for name in names:
        got = cell[name]
        if got["core_us"] is None:
            parts.append(f"{name} - ({got['note'][:60]})")
            continue
        full = "" if got["full_us"] is None else f" full {got['full_us']:.1f}"
        note = f" [{got['note'][:50]}]" if got["note"] else ""
        parts.append(f"{name} {got['core_us']:.1f} ({floor / got['core_us']:.2f}) e{got['error']:.0e}{full}{note}")
    return " | ".join(parts)


def build(shape: Shape, kind: str, options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """The implementations found for a shape, and its weights."""
    weights = shape.weights() if kind == "bf16" else quantized_weights(shape, kind)
    found: dict[str, Any] = {}
    for label, make in IMPLEMENTATIONS[kind].items():
        if options.only and label not in options.only:
            continue
        try:
            found[label] = make(*weights, options.peers)
        except Absent as reason:
            print(f"{kind} {shape.name}: {label} absent: {reason}", flush=True)
    return found, weights


def rows_of(shape: Shape, kind: str, options: argparse.Namespace) -> list[int]:
    """The row counts asked for."""
    known = ROWS[shape.name] if kind == "bf16" else QUANTIZED_ROWS
    return [rows for rows in known if not options.rows or rows in options.rows]


def compile_only(options: argparse.Namespace) -> None:
    """Run everything once, so that what compiles at run time is in its cache."""
    for kind, name in itertools.product(options.weights, options.shapes):
        found, _ = build(SHAPES[name], kind, options)
        for rows in rows_of(SHAPES[name], kind, options):
            case = make_case(SHAPES[name], rows, 1)
            for peer in found.values():
                for variant in peer.variants(case):
                    try:
                        run = peer.prepare(case, variant)
                        run.core()
                        torch.cuda.synchronize()
                    except Exception as failure:  # the measuring process reports it
                        print(kind, name, rows, type(failure).__name__, flush=True)


def compile_in_parallel(options: argparse.Namespace) -> None:
    """One process for each kind of weights, shape and implementation, a few at a time."""
    common = [sys.executable, "-m", "bench.kernels", "--compile-only"]
    if options.peers:
        common += ["--peers", str(options.peers)]
    if options.rows:
        common += ["--rows", *map(str, options.rows)]
    commands = [
        [*common, "--weights", kind, "--shapes", name, "--only", label]
        for kind, name in itertools.product(options.weights, options.shapes)
        for label in IMPLEMENTATIONS[kind]
        if not options.only or label in options.only
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=False, capture_output=True), commands))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="directory with peers' files that are not installed")
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=list(SHAPES))
    parser.add_argument("--weights", nargs="+", choices=list(IMPLEMENTATIONS), default=list(IMPLEMENTATIONS))
    parser.add_argument("--rows", nargs="+", type=int, help="only these row counts")
    parser.add_argument("--only", nargs="+", choices=list(IMPLEMENTATIONS["bf16"]), help="only these implementations")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--jobs", type=int, default=0, help="compile in so many processes first")
    parser.add_argument("--compile-only", action="store_true", help="run everything once and measure nothing")
    options = parser.parse_args(argv)
    if options.compile_only:
        compile_only(options)
        return
    if options.jobs:
        compile_in_parallel(options)
    clock = Clock()
    rates = ceilings(clock)
    print(f"{torch.cuda.get_device_name()}: read {rates['read'] / 1e6:.2f} TB/s, bf16 burst {rates['burst'] / 1e6:.0f} "
          f"sustained {rates['sustained'] / 1e6:.0f} TFLOP/s", flush=True)  # fmt: skip
    cells = []
    for kind, name in itertools.product(options.weights, options.shapes):
        shape = SHAPES[name]
        found, weights = build(shape, kind, options)
        for rows in rows_of(shape, kind, options):
            cells.append(row_of(shape, kind, weights, *measure(shape, rows, found, weights, clock), rates))
            print(show(cells[-1], list(found)), flush=True)
            if options.out:  # after each cell: a run that is cut off keeps what it measured
                result = {"card": torch.cuda.get_device_name(), "rates": rates, "cells": cells}
                options.out.write_text(json.dumps(result, indent=1))
            torch.cuda.empty_cache()
        del found, weights


if __name__ == "__main__":
    main()
