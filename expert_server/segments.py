"""The memory that routers of this machine share with an expert server, one segment for each connection."""

from __future__ import annotations

import numpy as np

from moering.shared_rows import SLOTS, SharedRows

MAX_ROUTERS = 64
"""Whoever said hello longest ago loses its segment to a newcomer, and has to say hello again."""


class Segments:
    """By the connection's identity. A router that says hello again has given up its earlier connection."""

    def __init__(self, hidden_size: int) -> None:
        self._hidden_size = hidden_size
        self._by_identity: dict[bytes, SharedRows] = {}
        self._identity_of: dict[str, bytes] = {}  # by router

    def open(self, identity: bytes, router: str, offer: str) -> bool:
        """Use the segment that a router offers; False when it offers none, or one that this process cannot open."""
        self._by_identity.pop(self._identity_of.pop(router, b""), None)
        segment = SharedRows.open(offer, self._hidden_size)
        if segment is None:
            return False
        while len(self._identity_of) >= MAX_ROUTERS:
            self._by_identity.pop(self._identity_of.pop(next(iter(self._identity_of))), None)
        self._by_identity[identity], self._identity_of[router] = segment, identity
        return True

    def slot(self, identity: bytes, slot: int, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray] | None:
        """(sent, answered), float32 [rows, hidden_size] each; None where the connection has no such memory."""
        segment = self._by_identity.get(identity)
        if segment is None or slot >= SLOTS or not segment.fits(rows, columns):
            return None
        return segment.sent[slot][:rows], segment.answered[slot][:rows]
