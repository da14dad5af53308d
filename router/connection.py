"""One connection to one incarnation of an expert server: a socket, a watch on its loss, and memory shared with it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from typing import Any

import numpy as np
import zmq

from moering import protocol, transport
from moering.doorbell import Doorbell, DoorbellOffer
from moering.errors import ProtocolError
from moering.expert_frames import INLINE, Reply
from moering.expert_frames import Dispatch as DispatchMessage
from moering.protocol import Hello, MemberInfo, Welcome
from moering.shared_rows import ARRAYS, Layout, Offer, Pin, SharedRows
from router.expert_rows import ExpertRows, Reading
from router.instructions import Dispatch


class Connection:
    """Never reused: a server that comes back, even at the same address, gets a new connection."""

    def __init__(self, server: MemberInfo, hello: Hello, hidden_size: int, pin: Pin | None = None) -> None:
        """Connect and say hello. `pin` prepares shared memory for a GPU. Raises `OSError` when the address does not
        resolve, that or `zmq.ZMQError` when too many files are open."""
        self.server_id, self.incarnation = server.server_id, server.incarnation
        self.key = server.server_id, server.incarnation
        self.welcomed, self.open = False, True
        self._router, self._hidden_size, self._slots = hello.incarnation, hidden_size, hello.shared_slots
        self._dtype = hello.dtype  # until the welcome, what is asked for
        self._offer = Offer.make() if self._slots and transport.is_local(server.address) else None
        self._bell_offer = DoorbellOffer.make() if self._offer is not None else None
        self._shared: SharedRows | None = None
        self.bell: Doorbell | None = None
        self._free_slots: list[int] = []  # none before the server has accepted the offer
        self._slot_of: dict[int, int] = {}  # by seq, until the answer is here
        self._reading: deque[tuple[Reading, int]] = deque()  # slots whose answer a GPU still reads, in that order
        self._pin = pin
        with contextlib.ExitStack() as undo:
            undo.callback(self._withdraw)
            self.socket = undo.enter_context(
                transport.make_socket(zmq.DEALER, transport.DATA, queue_messages=10_000)
            )  # fmt: skip
            self.watch = undo.enter_context(transport.watch_disconnects(self.socket))
            undo.callback(self.socket.disable_monitor)
            transport.connect(self.socket, server.address)
            undo.pop_all()
        if self._offer is not None:
            doorbell = self._bell_offer.text if self._bell_offer is not None else ""
            hello = dataclasses.replace(hello, shared_rows=self._offer.text, doorbell=doorbell)
        transport.try_send(self.socket, [protocol.encode(hello)])

    def register(self, poller: zmq.Poller) -> None:
        """Poll for messages and for the loss of the connection."""
        for source in self.sources:
            poller.register(source, zmq.POLLIN)

    def unregister(self, poller: zmq.Poller) -> None:
        """The reverse of `register`."""
        for source in self.sources:
            poller.unregister(source)

    @property
    def sources(self) -> list[Any]:
        """What is to be polled; a doorbell from the welcome on."""
        return [self.socket, self.watch] if self.bell is None else [self.socket, self.watch, self.bell.fd]

    def welcome(self, message: Welcome) -> None:
        """The server takes dispatches, and rows in shared memory if it could open what was offered. Only the first
        counts: slots may be in use when another one comes. Raises `ProtocolError` for rows or slots that cannot be."""
        if self.welcomed:
            return
        if message.dtype not in ("float32", self._dtype):
            raise ProtocolError(f"rows in {message.dtype} where {self._dtype} was asked for")
        self._dtype = message.dtype
        if self._offer is not None and message.slot_rows:
            layout = Layout(self._slots, message.slot_rows, self._hidden_size, message.dtype)
            if not layout.possible:
                raise ProtocolError(f"slots of {message.slot_rows} rows")
            self._shared = self._offer.accepted(layout, self._pin)
            self._free_slots = list(range(self._slots))
        if self._shared is not None and self._bell_offer is not None and message.doorbell:
            self.bell, self._bell_offer = self._bell_offer.accepted(), None
        self.welcomed = True
        self._withdraw()

    @property
    def terms(self) -> str:
        """How rows travel, for the log."""
        slots = "no shared memory" if self._shared is None else f"{self._slots} slots of {self._shared.layout.rows}"
        return f"{self._dtype} rows, {slots}{', doorbell' if self.bell is not None else ''}"

    def lost(self) -> bool:
        """Whether the watch has anything to say: all that it watches for means that this connection is over. So does a
        doorbell that hangs up."""
        return (self.bell is not None and self.bell.hung_up) or transport.read_event(self.watch) is not None

    def receive(self) -> list[bytes] | None:
        """The next message, if one is waiting."""
        if self.bell is not None and (packet := self.bell.receive()) is not None:
            return [packet]
        return transport.try_receive(self.socket)

    def send(self, d: Dispatch, rows: ExpertRows) -> bool:
        """Send, without blocking, the dispatch's rows: by way of a slot of shared memory, where that is possible."""
        frames = self._pack(d, rows)
        if self.bell is not None and len(frames) == 1 and self.bell.send(frames[0]):
            return True
        return transport.try_send(self.socket, frames)

    def _pack(self, d: Dispatch, rows: ExpertRows) -> list[bytes | memoryview]:
        router, slot = self._router, self._take_slot(len(d.experts))
        if self._shared is not None and slot != INLINE:
            self._slot_of[d.seq] = slot
            count, pairs = rows.pack(d, self._shared.sent[slot])
            message = DispatchMessage(
                router, d.seq, d.layer, d.prefill, pairs, self._dtype, count, self._hidden_size, slot
            )  # fmt: skip
            return [protocol.encode(message)]
        sent = rows.frame(d, self._dtype)
        pairs = d.local_rows().tobytes() + d.experts.astype(np.uint16).tobytes()
        message = DispatchMessage(router, d.seq, d.layer, d.prefill, pairs, self._dtype, *sent.shape)
        return [protocol.encode(message), memoryview(sent).cast("B")]  # type: ignore[arg-type]

    def _take_slot(self, pairs: int) -> int:
        """A free slot that holds so many rows, and has memory."""
        if self._shared is not None and pairs <= self._shared.layout.rows:
            while self._reading and self._reading[0][0]() is None:
                self._free_slots.append(self._reading.popleft()[1])
            while self._free_slots:
                slot = self._free_slots.pop()
                if self._shared.ready(slot):
                    return slot
        return INLINE

    def answered(self, seq: int) -> int:
        """The server owes no answer to this dispatch any more; the slot that it had, which is then to be released."""
        return self._slot_of.pop(seq, INLINE)

    def release(self, slot: int, reading: Reading | None = None) -> None:
        """Nobody needs what is in the slot, or nobody will when `reading` ends."""
        if slot == INLINE:
            return
        if reading is None:
            self._free_slots.append(slot)
        else:
            self._reading.append((reading, slot))

    def memory_of(self, slot: int) -> SharedRows | None:
        """What a GPU can read the rows of this slot in, for as long as it is held; None where it cannot."""
        return self._shared if self._shared is not None and self._shared.is_pinned(slot) else None

    def rows_of(self, reply: Reply, slot: int, tensor: memoryview | None) -> np.ndarray:
        """The rows of a reply to a dispatch in `slot`, [rows, hidden_size], good until that is released.

        Raises `ProtocolError` where they are not what or where they should be.
        """
        if reply.dtype != self._dtype or reply.columns != self._hidden_size:
            raise ProtocolError(f"{reply.dtype} rows of {reply.columns}")
        if tensor is not None:
            return np.frombuffer(tensor, ARRAYS[reply.dtype]).reshape(reply.rows, reply.columns)
        if self._shared is None or reply.slot != slot or reply.rows > self._shared.layout.rows:
            raise ProtocolError(f"{reply.rows} rows in slot {reply.slot}, not in slot {slot}")
        return self._shared.answered[slot][: reply.rows]

    def close(self) -> None:
        """Close at once; nothing that is queued goes out."""
        self.open = False
        self.socket.disable_monitor()
        self.watch.close()
        self.socket.close()
        if self.bell is not None:
            self.bell.close()
        self._withdraw()
        if self._shared is not None and all(reading() is None for reading, _ in self._reading):
            self._shared.close()
        self._shared = None  # whoever still reads there holds it, and it closes when that lets go

    def _withdraw(self) -> None:
        if self._offer is not None:
            self._offer.withdraw()
            self._offer = None
        if self._bell_offer is not None:
            self._bell_offer.withdraw()
            self._bell_offer = None
