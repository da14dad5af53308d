"""Proven exits on their way to the coordinator, whichever that is."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

import zmq

from moering import protocol, transport
from moering.leader import Finder, Seat
from moering.protocol import ProvenExit

logger = logging.getLogger(__name__)

KEPT = 64


class ExitReports:
    """Sends each exit to the coordinator at hand, and the latest ones again to a new one, which cannot know of them.

    For one thread. A report of a process that has been replaced since changes nothing: it names the process id.
    """

    def __init__(self, coordinator: Finder) -> None:
        self._coordinator = coordinator
        self._latest: deque[bytes] = deque(maxlen=KEPT)
        self._seat: Seat | None = None
        self._socket: Any = None

    def follow(self) -> None:
        """The coordinator may have changed. One that cannot be connected to now is tried again with the next exit."""
        seat = self._coordinator.seat
        if seat is None or seat == self._seat:
            return
        try:
            address, socket = transport.resolve(seat.address), transport.make_socket(zmq.DEALER, reconnect=True)
        except (OSError, zmq.ZMQError) as e:  # it does not resolve, or too many files are open
            logger.warning("cannot report exits to the coordinator at %s (%s); trying at the next", seat.address, e)
            return
        self.close()
        socket.connect(address)
        self._socket, self._seat = socket, seat
        for report in self._latest:
            transport.try_send(socket, [report])

    def send(self, exit: ProvenExit) -> None:
        """Report `exit`."""
        self.follow()
        report = protocol.encode(exit)
        self._latest.append(report)
        if self._socket is not None:
            transport.try_send(self._socket, [report])

    def close(self) -> None:
        """Release the socket."""
        if self._socket is not None:
            self._socket.close()
