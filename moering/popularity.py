"""How many tokens each expert has had of late: the routers' counts, decayed. Pure: `now_s` is an argument."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from moering.errors import ProtocolError

DECAY_S = 300.0
PRIOR_TOKENS = 100.0
"""Every expert starts with so many, so that the first few prompts do not decide the placement."""
EVIDENCE = 4.0
"""Popularity is known once so many times the prior was counted: till then the prior says more."""


class Popularity:
    """Tokens per [layer, expert]."""

    def __init__(self, layers: int, experts: int) -> None:
        self._tokens = np.zeros((layers, experts), np.float64)
        self._as_of_s = 0.0

    def add(self, loads: bytes, now_s: float) -> None:
        """Count a router's `Lease.loads`. Raises `ProtocolError` for another shape or impossible counts."""
        if len(loads) != 4 * self._tokens.size:
            raise ProtocolError(f"lease: {len(loads)} bytes of loads for {self._tokens.size} experts")
        counts = np.frombuffer(loads, "<f4").reshape(self._tokens.shape)
        if not np.isfinite(counts).all() or (counts < 0).any():
            raise ProtocolError("lease: loads must be finite and not negative")
        self._decay(now_s)
        self._tokens += counts

    def tokens(self, now_s: float) -> npt.NDArray[np.float64]:
        """The decayed counts, with the prior."""
        self._decay(now_s)
        return self._tokens + PRIOR_TOKENS

    def known(self, now_s: float) -> bool:
        """Whether enough was counted to go by."""
        self._decay(now_s)
        return bool(self._tokens.sum() >= EVIDENCE * PRIOR_TOKENS * self._tokens.size)

    def _decay(self, now_s: float) -> None:
        self._tokens *= math.exp(-max(0.0, now_s - self._as_of_s) / DECAY_S)
        self._as_of_s = now_s


def ranks(tokens: npt.NDArray[np.float64]) -> bytes:
    """`Popularity.tokens` on a scale of one byte each, in eighths of a doubling above the prior."""
    doublings = np.log2(np.maximum(tokens, PRIOR_TOKENS) / PRIOR_TOKENS)
    scaled: npt.NDArray[np.uint8] = np.minimum(8 * doublings, 255).astype(np.uint8)
    return scaled.tobytes()
