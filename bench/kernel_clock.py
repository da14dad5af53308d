"""Timing by CUDA graphs with a cold L2, and the card's ceilings."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl


class Clock:
    """Captures calls in a graph and times its replays; the L2 is flushed before each."""

    def __init__(self) -> None:
        self._flush = torch.zeros(1 << 26, dtype=torch.int32, device="cuda")

    def graph(self, calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
        """The calls, one after another, run once and then captured."""
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
        """Median of some replays in microseconds."""
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


@triton.jit
def _read_kernel(source_ptr, sink_ptr, elements, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(tl.program_id(0) * 4 * BLOCK, elements, tl.num_programs(0) * 4 * BLOCK):
        for part in tl.static_range(4):
            total ^= tl.load(source_ptr + start + part * BLOCK + tl.arange(0, BLOCK))
    if tl.sum(total) == 123456789:  # never: the sum keeps the loads alive
        tl.store(sink_ptr, 1)


def ceilings(clock: Clock) -> dict[str, float]:
    """The card's read rate (bytes per µs) and bf16 rates (operations per µs), burst and sustained."""
    elements = 1 << 29
    source = torch.randint(0, 100, (elements,), dtype=torch.int32, device="cuda")
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")
    reads = []
    for programs, block in ((8, 1024), (4, 2048), (8, 2048)):

        def read(grid: tuple[int] = (132 * programs,), block: int = block) -> None:
            _read_kernel[grid](source, sink, elements, BLOCK=block)

        reads.append(clock.replay_us(clock.graph([read]), 5))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    burst = clock.replay_us(clock.graph([lambda: a @ b]), 5)
    sustained = clock.replay_us(clock.graph([lambda: a @ b] * 60), 2) / 60
    return {"read": 4 * elements / min(reads), "burst": 2 * 8192**3 / burst, "sustained": 2 * 8192**3 / sustained}
