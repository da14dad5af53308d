"""How evenly the rows of a layer fall on servers: what a token waits for, since layers run one after another. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Loads = npt.NDArray[np.float64]


def server_loads(replicas: npt.NDArray[np.int16], ways: npt.NDArray[np.uint8], tokens: Loads, servers: int) -> Loads:
    """The tokens of each server, [layers, servers], when the first `ways` replicas of an expert share its tokens.

    `replicas` [layers, experts, width] holds server indices, -1 padded; `ways` and `tokens` are [layers, experts].
    """
    layers, _, width = replicas.shape
    sharers = np.minimum(ways, (replicas >= 0).sum(axis=2))
    share = tokens / np.maximum(sharers, 1)
    loads = np.zeros((layers, servers))
    for nth in range(min(width, int(sharers.max(initial=0)))):
        layer, expert = np.nonzero(nth < sharers)
        np.add.at(loads, (layer, replicas[layer, expert, nth]), share[layer, expert])
    return loads


def max_over_mean(loads: npt.NDArray[Any]) -> Loads:
    """The highest of each row over the row's mean, [layers]; 0 for a row without any load."""
    if not loads.shape[1]:
        return np.zeros(len(loads))
    mean = loads.mean(axis=1)
    ratio: Loads = np.where(mean > 0, loads.max(axis=1) / np.where(mean > 0, mean, 1.0), 0.0)
    return ratio
