"""One MoE layer of one micro-batch, while its slots are computed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class Work:
    """One layer of one micro-batch."""

    layer: int
    top_k: int
    prefill: bool
    experts: np.ndarray  # int64 [rows × k]: the expert of each slot
    resumed: bool = False  # its rows were outstanding at deaths, then nobody could serve them
    outstanding: int = 0  # owners and quarantined parts
    missing: list[np.ndarray] = field(default_factory=list)
    missing_deaths: list[np.ndarray] = field(default_factory=list)  # of the same slots

    def miss(self, slots: np.ndarray, deaths: int) -> None:
        """These slots have no live replica."""
        self.missing.append(slots)
        self.missing_deaths.append(np.full(len(slots), deaths))

    def missed(self) -> tuple[np.ndarray, np.ndarray]:
        """All of them, ascending, and their deaths."""
        if not self.missing:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        slots, deaths = np.concatenate(self.missing), np.concatenate(self.missing_deaths)
        order = slots.argsort(kind="stable")
        return slots[order], deaths[order]
