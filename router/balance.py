"""How evenly this router's rows fall on experts and on servers, layer by layer, of late: for the metrics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from moering.balance import max_over_mean

KEPT_PER_REPORT = 0.98
"""Of what was counted before; with a report a second this forgets within about 50 s."""


class Balance:
    """Counts (row, expert) pairs. Used by the engine's thread only."""

    def __init__(self) -> None:
        self._experts = np.zeros((0, 0))  # [layers, experts]
        self._servers: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))  # id → layer → pairs

    def reshape(self, layers: int, experts: int) -> None:
        """The model's shape; the counts begin anew if it has changed."""
        if self._experts.shape != (layers, experts):
            self._experts = np.zeros((layers, experts))
            self._servers.clear()

    def chosen(self, layer: int, counts: np.ndarray) -> None:
        """The gate chose each expert of a layer so many times, [experts]."""
        if layer < len(self._experts):
            self._experts[layer] += counts

    def sent(self, server: str, layer: int, pairs: int) -> None:
        """A server was given so many pairs to compute."""
        self._servers[server][layer] += pairs

    def report(self, servers: Sequence[str]) -> tuple[list[float], list[float]]:
        """Each layer's max/mean over its experts, and over these servers; 0 for a layer without rows. Call it every
        second: it also forgets."""
        layers = len(self._experts)
        loads = np.array([[self._servers[s][layer] for s in servers] for layer in range(layers)])
        loads = loads.reshape(layers, len(servers))
        ratios = max_over_mean(self._experts).tolist(), max_over_mean(loads).tolist()
        self._experts *= KEPT_PER_REPORT
        for by_layer in self._servers.values():
            for layer in by_layer:
                by_layer[layer] *= KEPT_PER_REPORT
        return ratios
