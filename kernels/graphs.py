"""CUDA graphs of the work between two points: captured at the second use of a shape, replayed from then on."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch


class Graphs:
    """Runs bodies that read and write memory at fixed addresses only. Without a GPU it just calls them."""

    def __init__(self, device: torch.device) -> None:
        self._enabled = device.type == "cuda"
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def run(self, key: Hashable, body: Callable[[], None]) -> None:
        """Run `body`, whose launches are the same at every call with this key."""
        graph = self._graphs.get(key)
        if graph is None and (not self._enabled or key not in self._seen):
            self._seen.add(key)  # the first run compiles and loads kernels, which a capture may not
            body()
            return
        if graph is None:
            graph = self._graphs[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                body()
        graph.replay()
