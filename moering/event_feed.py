"""Sends the timeline to every gateway, each from where it is: one that is new gets what is remembered."""

from __future__ import annotations

from typing import Any

from moering import protocol, transport
from moering.membership import Membership
from moering.protocol import Events

BATCH = 100


class EventFeed:
    """What each gateway has been sent. For one coordinator in office."""

    def __init__(self) -> None:
        self._sent: dict[bytes, int] = {}  # zmq identity → id of the last event

    def send(self, membership: Membership, socket: Any) -> None:
        """Send what is new, a batch per gateway at most."""
        here = {r.identity for r in membership.roster.alive("gateway")}
        self._sent = {identity: self._sent.get(identity, 0) for identity in here}
        for identity, last in self._sent.items():
            events = membership.timeline.after(last, BATCH)
            if events and transport.try_send(socket, [identity, protocol.encode(Events(events))]):
                self._sent[identity] = events[-1].id
