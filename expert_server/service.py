"""The compute thread: receives dispatches, computes them in grouped calls, answers. It owns the routers' socket."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from expert_server import batching
from expert_server.batching import Group, Request
from expert_server.inbox import Inbox
from expert_server.residency import Residency
from expert_server.segments import Segments
from moering import protocol, transport
from moering.errors import ProtocolError
from moering.expert_frames import ITEM_BYTES, Dispatch, Reply
from moering.protocol import MAX_TENSOR_BYTES, Failed, Hello, NotHere, Refused, Welcome
from moering.shared_rows import ARRAYS, SLOT_BYTES, Pin

logger = logging.getLogger(__name__)

STOP_CHECK_MS = 200
SPIN_SWITCH_S = 2e-4
"""For how long other threads of a process wait for one that looks for messages without a rest."""

Compute = Callable[[np.ndarray, np.ndarray | None, list[int], list[Any], np.ndarray], None]
"""(hidden [rows, H], rows [pairs] or None for one row a pair, counts, experts, out [pairs, H]): the grouped kernel.
`hidden` and `out` are of one type of `moering.shared_rows.ARRAYS`."""


class Service(threading.Thread):
    """Serves routers with the experts of `residency`. Start it early; it waits for `open`."""

    def __init__(self, socket: Any, server_id: str, incarnation: int, credit_rows: int, residency: Residency) -> None:
        super().__init__(name="compute", daemon=True)
        self._socket, self._server_id, self._incarnation = socket, server_id, incarnation
        self._inbox = Inbox(socket)
        self._credit_rows, self._residency = credit_rows, residency
        self._opened = threading.Event()
        self._stopping = False
        self.progress = 0  # turns of the loop: a lease reports it
        self.queued = 0
        self.calls = 0  # of the grouped kernel
        self.epoch = 0

    def open(
        self,
        model: str,
        digest: str,
        shape: tuple[int, int, int],
        compute: Compute,
        max_tensor_bytes: int = MAX_TENSOR_BYTES,
        spin_s: float = 0.0,
        slot_bytes: int = SLOT_BYTES,
        dtype: str = "float32",
        pin: Pin | None = None,
    ) -> None:
        """Begin to serve a checkpoint of `shape` = (layers, experts, hidden_size).

        Messages carry at most `max_tensor_bytes` of rows, in shared memory at most `slot_bytes`. After each, the next
        is looked for without a rest for `spin_s`: a thread that sleeps wakes up late. `compute` takes float32 rows, and
        those of `dtype`, which routers may ask for; it has done with them when it returns. `pin` prepares shared memory
        for its GPU.
        """
        self._model, self._digest, self._compute, self._spin_s = model, digest, compute, spin_s
        if spin_s:
            sys.setswitchinterval(SPIN_SWITCH_S)
        hidden_size, self._dtype = shape[2], dtype
        dtypes = tuple(dict.fromkeys(("float32", dtype)))
        self._most_pairs = {d: max(1, max_tensor_bytes // (ITEM_BYTES[d] * hidden_size)) for d in dtypes}
        self._max_pairs = self._most_pairs[dtype]
        self._limits = batching.Limits(*shape, self._max_pairs, dtypes)
        self._segments = Segments(hidden_size, slot_bytes, pin)
        # by dtype: rows of several requests together, and what becomes of them
        self._hidden = {d: np.zeros((self._max_pairs, hidden_size), ARRAYS[d]) for d in dtypes}
        self._out = {d: np.zeros((self._max_pairs, hidden_size), ARRAYS[d]) for d in dtypes}
        self._opened.set()

    def close(self) -> None:
        """Stop after the batch in hand."""
        self._stopping = True
        self._opened.set()
        if self.is_alive():
            self.join(timeout=5.0)

    def run(self) -> None:
        """The thread's loop: receive, group, compute, reply."""
        self._opened.wait()
        while not self._stopping:
            requests = self._receive()
            self.queued = len(requests)
            for group in batching.group(requests, self._max_pairs):
                self._answer(group)
                self.queued -= len(group.requests)
            self.progress += 1
        self._inbox.close()

    def _receive(self) -> list[Request]:
        """Wait for a message, then take all that are there, within the credit of one router. Returns the dispatches;
        other messages are answered at once."""
        requests: list[Request] = []
        rows = 0
        while self._inbox.gone:
            self._segments.forget(self._inbox.gone.pop())
        if not (self._spin_s and self._spin()):
            self._inbox.wait(STOP_CHECK_MS)
        while rows < self._credit_rows and (found := self._inbox.take()) is not None:
            request = self._handle(*found)
            if request is not None:
                requests.append(request)
                rows += len(request.hidden)
        return requests

    def _spin(self) -> bool:
        until_s = time.perf_counter() + self._spin_s
        while time.perf_counter() < until_s:
            if self._inbox.wait(0):
                return True
            os.sched_yield()  # lets the process's other threads run; a sleep of 0 takes 55 µs
        return False

    def _handle(self, identity: bytes, frames: list[bytes]) -> Request | None:
        try:
            message, tensor = protocol.decode(frames)
        except ProtocolError as e:
            logger.warning("refused a message: %s", e)
            self._send(identity, Refused(str(e), fatal=True))
            return None
        if isinstance(message, Hello):
            self._send(identity, self._greet(identity, message))
        elif isinstance(message, Dispatch):
            return self._parse(identity, message, tensor)
        else:
            self._send(identity, Refused(f"an expert server takes no {message.KIND}", fatal=True))
        return None

    def _greet(self, identity: bytes, hello: Hello) -> Welcome | Refused:
        if (hello.model, hello.digest) != (self._model, self._digest):
            return Refused(hello.asks_for_another(self._server_id, self._model, self._digest), fatal=True)
        dtype = self._dtype if hello.dtype == self._dtype else "float32"
        slot_rows = self._segments.open(identity, hello.server_id, hello.shared_rows, hello.shared_slots, dtype)
        pairs = self._most_pairs[dtype]
        doorbell = slot_rows > 0 and self._inbox.open(identity, hello.doorbell)
        return Welcome(self._server_id, self._incarnation, self._credit_rows, pairs, slot_rows, dtype, doorbell)

    def _parse(self, identity: bytes, message: Dispatch, tensor: memoryview | None) -> Request | None:
        rows: memoryview | tuple[np.ndarray, np.ndarray] | None = tensor
        if tensor is None:
            rows = self._segments.slot(identity, message)
        if rows is None:
            request: Request | str = f"{message.dtype} rows in slot {message.slot} of memory that is not shared so"
        else:
            request = batching.parse(identity, message, rows, self._limits)
        if isinstance(request, Request):
            return request
        logger.warning("refused a dispatch: %s", request)
        self._send(identity, Failed(f"{message.router}/{message.seq}", 0, "bad_request", request))
        return None

    def _answer(self, group: Group) -> None:
        layer = group.requests[0].message.layer
        experts = self._residency.find(layer, group.experts)
        if None in experts:
            self._answer_without(group, {e for e, x in zip(group.experts, experts, strict=True) if x is None})
            return
        self.calls += 1
        started = time.perf_counter_ns()
        first = group.requests[0]
        if len(group.requests) == 1 and first.out is not None:
            self._compute(first.hidden, group.rows, group.counts, experts, first.out)
            parts = [first.out]
        else:
            parts = self._compute_copies(group, experts)
        compute_us = (time.perf_counter_ns() - started) // 1000
        for r, rows in zip(group.requests, parts, strict=True):
            m = r.message
            if r.out is not None and rows is not r.out:
                r.out[:] = rows
            reply = Reply(m.router, m.seq, self._incarnation, compute_us, m.dtype, len(rows), m.columns, m.slot)
            self._send(r.identity, reply, rows if r.out is None else None)

    def _compute_copies(self, group: Group, experts: list[Any]) -> list[np.ndarray]:
        """Rows of several requests, or from frames, in one array for the grouped call; aligned, as frames are not."""
        dtype, at = group.requests[0].message.dtype, 0
        hidden, out = self._hidden[dtype], self._out[dtype][: sum(group.counts)]
        for r in group.requests:
            hidden[at : at + len(r.hidden)] = r.hidden
            at += len(r.hidden)
        self._compute(hidden[:at], group.rows, group.counts, experts, out)
        return batching.split(group, out)

    def _answer_without(self, group: Group, missing: set[int]) -> None:
        """Some experts are not here: refuse the requests that need them, compute the others."""
        rest = []
        for r in group.requests:
            if missing.isdisjoint(r.experts):
                rest.append(r)
            else:
                self._send(r.identity, NotHere(r.message.router, r.message.seq, self._incarnation, self.epoch))
        for smaller in batching.group(rest, self._max_pairs):
            self._answer(smaller)

    def _send(self, identity: bytes, message: Any, tensor: np.ndarray | None = None) -> None:
        header = protocol.encode(message)
        if tensor is None and message.__class__ is Reply and self._inbox.answer(identity, header):
            return
        frames = [identity, header]
        if tensor is not None:
            frames.append(memoryview(tensor).cast("B"))  # type: ignore[arg-type]
        if not transport.try_send(self._socket, frames):
            logger.info("a router is gone: dropped a %s for it", message.KIND)
