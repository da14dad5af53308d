"""What tests ask of a plan."""

from __future__ import annotations

import numpy as np

from moering.ring import Plan


def held_by(plan: Plan, server_id: str) -> list[tuple[int, int]]:
    """The (layer, expert) pairs that a server should hold, sorted."""
    layers, experts = np.nonzero(plan.mask_of(server_id))
    return list(zip(layers.tolist(), experts.tolist(), strict=True))
