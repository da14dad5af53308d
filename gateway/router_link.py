"""One connection to one incarnation of a router. The socket is read from the event loop, without zmq.asyncio.

libzmq's descriptor is edge-triggered and fires only for a socket that was found empty before: each socket is read until
empty at the start, whenever its descriptor fires, and after every send.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import zmq

from gateway.journal import Record
from moering import protocol, transport
from moering.errors import HandshakeError, ProtocolError
from moering.protocol import Hello, MemberInfo, Refused, Welcome

logger = logging.getLogger(__name__)

HEARTBEAT = transport.Heartbeat(250, 1000)
"""libzmq's own thread answers, however busy a process is: one that is stopped is noticed within 1.25 s."""
SILENCE_S = 10
"""A router's main loop sends its figures every second: one that hangs while its process lives is noticed so late."""
HELLO_TIMEOUT_S = 5.0
MAX_MESSAGES_PER_TURN = 64
"""A router that sends without end must not keep the loop from everything else."""


class RouterLink:
    """Hello, then messages both ways, until the connection is lost; `lost` then holds the reason.

    `on_ready` is called once the router has welcomed us, `on_message` for each later message.
    """

    def __init__(
        self,
        member: MemberInfo,
        address: str,
        identity: bytes,
        hello: Hello,
        on_ready: Callable[[RouterLink], None],
        on_message: Callable[[RouterLink, Any], None],
    ) -> None:
        """Connect to the numeric `address`; must run on the event loop."""
        self.member = member
        self.records: set[Record] = set()
        self.others_load = 0  # what the router computes for other gateways, by its last report
        self.ready = False  # usable now
        self.welcomed = False  # ever was
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[Exception] = self._loop.create_future()
        self._on_ready, self._on_message = on_ready, on_message
        self._socket = transport.make_socket(zmq.DEALER, HEARTBEAT, queue_messages=10_000)
        self._socket.identity = identity
        self._monitor = transport.watch_disconnects(self._socket)
        self._fds = (int(self._socket.fd), int(self._monitor.fd))
        self._loop.add_reader(self._fds[0], self._read)
        self._loop.add_reader(self._fds[1], self._read_monitor)
        self._loop.call_soon(self._read_monitor)
        self._silent_s = 0
        self._timer = self._loop.call_later(HELLO_TIMEOUT_S, self._fail, TimeoutError("no answer to hello"))
        self._socket.connect(address)
        self.send(hello)

    @property
    def load(self) -> float:
        """Outstanding work: choices, and a little more for many tokens that are still to be computed."""
        return self.others_load + sum(1.0 + r.to_prefill / 1024 for r in self.records)

    @property
    def closed(self) -> bool:
        """Whether nothing can come of it any more."""
        return bool(self._socket.closed)

    def send(self, *messages: Any) -> bool:
        """Send without blocking; several as the frames of one zmq message, as the router would begin with the first of
        them alone. A router that takes nothing any more counts as lost."""
        if self.lost.done():
            return False
        if not transport.try_send(self._socket, [protocol.encode(message) for message in messages]):
            self._fail(ConnectionError("its queue is full"))
            return False
        self._loop.call_soon(self._read)
        return True

    def close(self) -> None:
        """Close the socket; idempotent."""
        if self._socket.closed:
            return
        for fd in self._fds:
            self._loop.remove_reader(fd)
        self._timer.cancel()
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)
        self.ready = False

    def _fail(self, reason: Exception) -> None:
        self.ready = False
        if not self.lost.done():
            self.lost.set_result(reason)

    def _count_silence(self) -> None:
        """Once a second. Counted in turns of this loop, so that a pause of this process is not the router's silence."""
        self._read()
        self._silent_s += 1
        if self._silent_s >= SILENCE_S:
            self._fail(TimeoutError(f"silent for {SILENCE_S} s"))
        elif not self.lost.done():
            self._timer = self._loop.call_later(1.0, self._count_silence)

    def _read_monitor(self) -> None:
        self._read()  # what arrived before the end still counts
        while not self._monitor.closed and transport.read_event(self._monitor) is not None:
            self._fail(ConnectionError("disconnected"))

    def _read(self) -> None:
        for _ in range(MAX_MESSAGES_PER_TURN):
            if self.lost.done() or self._socket.closed:
                return
            frames = transport.try_receive(self._socket)
            if frames is None:
                return
            self._silent_s = 0
            self._handle(frames)
        self._loop.call_soon(self._read)

    def _deliver(self, message: Any) -> None:
        """A message that cannot be acted on is lost, and all that follows it is of no use: its requests go on over
        another connection with what their clients have, rather than wait for it until their deadline."""
        try:
            self._on_message(self, message)
        except Exception as e:
            logger.exception("cannot act on a %s message of router %s", message.KIND, self.member.server_id)
            self._fail(e)

    def _handle(self, frames: list[bytes]) -> None:
        try:
            message, _ = protocol.decode(frames)
        except ProtocolError as e:
            self._fail(e)
            return
        if isinstance(message, Refused):
            text = f"refused: {message.reason}"
            for_good = message.fatal and not self.welcomed
            self._fail(HandshakeError(text) if for_good else ConnectionError(text))
        elif not isinstance(message, Welcome):
            self._deliver(message)
        elif message.incarnation != self.member.incarnation:
            self._fail(ConnectionError(f"another incarnation answers there: {message.incarnation}"))
        elif not self.welcomed:
            self.ready = self.welcomed = True
            self._timer.cancel()
            self._timer = self._loop.call_later(1.0, self._count_silence)
            self._on_ready(self)
