"""Bringing experts to the GPU from pinned host memory and from the page cache, and what computing notices of it.

    python -m bench.residency --weights fp8 --out residency.json

Experts of Qwen3-30B-A3B's shape. Each phase computes calls of 8 rows over 8 experts, one after another; beside it a
second thread promotes, loads, or does nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from expert_server.backend_cuda import CudaBackend
from expert_server.formats_cuda import Bf16, Format, Fp8, nbytes
from moering.checkpoint import ExpertWeights, RawTensor

HIDDEN, INTERMEDIATE, EXPERTS, PHASE_S, DEVICE = 2048, 768, 64, 3.0, "cuda"


FORMATS: dict[str, Format] = {"bf16": Bf16(HIDDEN, INTERMEDIATE), "fp8": Fp8(HIDDEN, INTERMEDIATE)}


def random_expert(seed: int, weights: str) -> ExpertWeights:
    """Weights as a checkpoint's bytes, "bf16" or "fp8"."""
    rng = np.random.default_rng(seed)

    def raw(dtype: str, values: torch.Tensor) -> RawTensor:
        return RawTensor(dtype, tuple(values.shape), values.view(torch.uint8).numpy().reshape(-1))

    def tensor(rows: int, depth: int) -> RawTensor:
        values = torch.from_numpy(rng.standard_normal((rows, depth), np.float32))
        if weights == "bf16":
            return raw("BF16", (values * depth**-0.5).bfloat16())
        scale = torch.full((rows // 128, depth // 128), depth**-0.5 / 64).bfloat16()
        return replace(raw("F8_E4M3", (values * 64).to(torch.float8_e4m3fn)), scale=raw("BF16", scale))

    gate, up = tensor(INTERMEDIATE, HIDDEN), tensor(INTERMEDIATE, HIDDEN)
    return ExpertWeights(gate, up, tensor(HIDDEN, INTERMEDIATE), bytes(8))


def phase(
    backend: CudaBackend, resident: Sequence[Any], beside: Callable[[int], object] | None, expert_bytes: int
) -> dict[str, float]:
    """Calls while `beside` runs again and again in another thread: milliseconds of both, and GB/s of the copies."""
    stop, took = threading.Event(), []

    def work() -> None:
        turn = 0
        while beside is not None and not stop.is_set():
            begun = time.perf_counter()
            beside(turn)
            took.append(time.perf_counter() - begun)
            turn += 1

    worker = threading.Thread(target=work)
    worker.start()
    hidden = np.random.default_rng(0).standard_normal((8, HIDDEN), np.float32)
    out, calls = np.empty((64, HIDDEN), np.float32), []
    until = time.perf_counter() + PHASE_S
    while time.perf_counter() < until:
        begun = time.perf_counter()
        backend.compute(hidden, np.tile(np.arange(8), 8), [8] * 8, resident, out)
        calls.append(time.perf_counter() - begun)
    stop.set()
    worker.join()
    calls.sort()
    found = {"call_ms": 1e3 * statistics.median(calls), "call_p99_ms": 1e3 * calls[int(0.99 * len(calls))],
             "call_max_ms": 1e3 * calls[-1], "calls": len(calls)}  # fmt: skip
    if took:
        found |= {"expert_ms": 1e3 * statistics.median(took), "expert_max_ms": 1e3 * max(took), "experts": len(took),
                  "gb_per_s": expert_bytes / statistics.median(took) / 1e9}  # fmt: skip
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--weights", choices=tuple(FORMATS), default="bf16")
    options = parser.parse_args(argv)
    begun, weight_format = time.perf_counter(), FORMATS[options.weights]
    backend = CudaBackend(weight_format, 16, host_replicas=EXPERTS, device=DEVICE)
    result: dict[str, Any] = {"card": torch.cuda.get_device_name(), "start_s": time.perf_counter() - begun}
    weights = [random_expert(seed, options.weights) for seed in range(EXPERTS)]
    for number, expert in enumerate(weights):
        backend.host_replicas.put((0, number), expert)
    resident = [backend.load(expert) for expert in weights[:8]]
    phases: dict[str, Callable[[int], object] | None] = {
        "alone": None,
        "promoting": lambda turn: backend.host_replicas.promote((0, turn % EXPERTS)),
        "loading": lambda turn: backend.load(weights[turn % EXPERTS]),
        "alone again": None,
    }
    for name, beside in phases.items():
        result[name] = phase(backend, resident, beside, nbytes(weight_format.parts))
        print(name, {key: round(value, 3) for key, value in result[name].items()}, flush=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
