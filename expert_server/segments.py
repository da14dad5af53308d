"""The memory that routers of this machine share with an expert server, one segment for each connection."""

from __future__ import annotations

import numpy as np

from moering.expert_frames import Dispatch
from moering.shared_rows import Layout, Pin, SharedRows

MAX_ROUTERS = 64
"""Whoever said hello longest ago loses its segment to a newcomer, and has to say hello again."""


class Segments:
    """By the connection's identity. A router that says hello again has given up its earlier connection."""

    def __init__(self, hidden_size: int, slot_bytes: int, pin: Pin | None = None) -> None:
        """Slots hold so many bytes of rows in each direction, and are pinned for a GPU with `pin`."""
        self._hidden_size, self._slot_bytes, self._pin = hidden_size, slot_bytes, pin
        self._by_identity: dict[bytes, SharedRows] = {}
        self._identity_of: dict[str, bytes] = {}  # by router

    def open(self, identity: bytes, router: str, offer: str, slots: int, dtype: str) -> int:
        """Use the memory that a router offers, for so many slots of rows of `dtype`.

        Returns the rows of each; 0 when it offers none, or what this process cannot open. That may be an earlier
        connection's hello, which is read late: what a later one has offered stays.
        """
        segment = SharedRows.open(offer, Layout.of(slots, self._slot_bytes, self._hidden_size, dtype), self._pin)
        if segment is None:
            return 0
        self.forget(self._identity_of.get(router, b""))
        while len(self._identity_of) >= MAX_ROUTERS:
            self.forget(next(iter(self._identity_of.values())))
        self._by_identity[identity], self._identity_of[router] = segment, identity
        return segment.layout.rows

    def forget(self, identity: bytes) -> None:
        """What was received there and is not computed yet is computed all the same; no computation is under way."""
        segment = self._by_identity.pop(identity, None)
        if segment is not None:
            segment.close()
            self._identity_of = {router: i for router, i in self._identity_of.items() if i != identity}

    def slot(self, identity: bytes, message: Dispatch) -> tuple[np.ndarray, np.ndarray] | None:
        """(sent, answered) of the slot that a dispatch names; None where the connection has no such memory."""
        segment, slot = self._by_identity.get(identity), message.slot
        if segment is None or slot >= segment.layout.slots or message.dtype != segment.layout.dtype:
            return None
        segment.ready(slot)  # the router has found memory for it
        return segment.sent[slot], segment.answered[slot]
