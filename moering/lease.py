"""The member's side of the coordinator: a thread that registers, renews the lease and receives the views.

What it says and what it takes is `moering.lease_session`; this is its socket and clock. It runs apart from the main
loop, so that loading, compiling or a long forward never lets a lease lapse. What it reports of the main loop (progress,
queue, suspects) it asks for by callback at each renewal. While the coordinator is away the member serves on with its
last view. Where coordinators are elected, it follows the elected one.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from typing import Any

import zmq

from moering import protocol, transport
from moering.errors import ProtocolError
from moering.leader import Finder, Seat
from moering.lease_session import LeaseSession
from moering.refusals import REFUSALS, say_seldom

logger = logging.getLogger(__name__)

RENEW_S = 1.0
BROKEN_OFF = (errno.EPIPE, errno.ECONNRESET)
"""How a coordinator with another cluster key ends a handshake. With one that stands still, a handshake times out."""


class LeaseClient(threading.Thread):
    """Keeps one process a member of the cluster. A coordinator with another cluster key is tried again and again.

    The callbacks of `session` are called on this thread. `renew` may be called from any thread when something urgent
    changed.
    """

    def __init__(self, coordinator: Finder, session: LeaseSession) -> None:
        super().__init__(name="lease", daemon=True)
        self._coordinator, self._session = coordinator, session
        self._wakeup = transport.Wakeup()
        self._stopping = threading.Event()

    def renew(self) -> None:
        """Send a lease now instead of at the next second."""
        self._wakeup.set()

    def send(self, message: Any) -> None:
        """Send `message` to the coordinator soon, after what was given before."""
        self._session.send(message)
        self._wakeup.set()

    def close(self, last: Any = None) -> None:
        """Send `last` (a `Leave`), stop the thread and wait for it."""
        if last is not None:
            self._session.send(last)
        self._stopping.set()
        self._wakeup.set()
        if self.is_alive():
            self.join(timeout=2.0)

    def run(self) -> None:
        """The thread's loop; see the class."""
        self._coordinator.start(self._wakeup.set)
        poller = zmq.Poller()
        poller.register(self._wakeup.fd, zmq.POLLIN)
        while not self._stopping.is_set():
            seat = self._coordinator.seat
            if seat is not None:
                self._serve(seat, poller)
            elif poller.poll(int(RENEW_S * 1000)):
                self._wakeup.clear()
        self._coordinator.close()

    def _serve(self, seat: Seat, poller: zmq.Poller) -> None:
        """Be a member with the coordinator in `seat`, until there is another one, or it refuses the handshake, or the
        end."""
        self._session.begin()
        try:
            socket = transport.make_socket(zmq.DEALER, reconnect=True)
            watch = transport.watch_handshakes(socket)
        except zmq.ZMQError as e:  # for example too many open files: this process serves on meanwhile
            logger.warning("cannot connect to the coordinator at %s (%s); trying again", seat.address, e)
            self._stopping.wait(RENEW_S)
            return
        for each in (socket, watch):
            poller.register(each, zmq.POLLIN)
        try:
            self._connect(socket, seat)
            while not self._stopping.is_set() and self._coordinator.seat == seat:
                self._send(socket, self._session.renewal())
                if not self._wait(poller, socket, watch):
                    self._stopping.wait(RENEW_S)
                    break
            if self._stopping.is_set():
                self._send(socket, self._session.waiting())
        finally:
            for each in (socket, watch):
                poller.unregister(each)
            socket.disable_monitor()
            watch.close()
            socket.close(200)  # linger: a Leave should still go out

    def _connect(self, socket: Any, seat: Seat) -> None:
        while not self._stopping.is_set() and self._coordinator.seat == seat:
            try:
                return transport.connect(socket, seat.address)
            except OSError as e:
                logger.warning("cannot resolve the coordinator's address %s (%s); trying again", seat.address, e)
                self._stopping.wait(RENEW_S)

    def _send(self, socket: Any, messages: list[Any]) -> None:
        for message in messages:
            transport.try_send(socket, [protocol.encode(message)])

    def _wait(self, poller: zmq.Poller, socket: Any, watch: zmq.Socket[bytes]) -> bool:
        """Handle messages until it is time to renew or somebody calls `renew`. False when the socket is of no use any
        more: after a refused handshake libzmq does not connect it again."""
        until = time.monotonic() + RENEW_S
        while (left := until - time.monotonic()) > 0 and not self._stopping.is_set():
            ready = dict(poller.poll(int(left * 1000) + 1))
            if self._wakeup.fd in ready:
                self._wakeup.clear()
                return True
            if watch in ready and self._refused(socket, watch):
                return False
            while (frames := transport.try_receive(socket)) is not None:
                if self._handle(frames):
                    return True
        return True

    def _refused(self, socket: Any, watch: zmq.Socket[bytes]) -> bool:
        events = list(iter(lambda: transport.read_event(watch), None))
        broken_off = any(e.kind == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and e.value in BROKEN_OFF for e in events)
        if broken_off and transport.has_key():
            address = socket.last_endpoint.decode()
            say_seldom(f"no handshake with the coordinator at {address}: has it another cluster key? (--key)")
        return any(event.kind & REFUSALS for event in events)

    def _handle(self, frames: list[bytes]) -> bool:
        """Act on one message; True when the answer should not wait for the next renewal."""
        try:
            message, _ = protocol.decode(frames)
            return self._session.take(message)
        except ProtocolError as e:
            logger.warning("dropped a message from the coordinator: %s", e)
            return False
