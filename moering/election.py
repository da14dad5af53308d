"""One of several coordinators is elected through etcd, and only what the elected one publishes there goes out.

Three keys: ``leader`` (who, and where members find it; bound to an etcd lease), ``term`` (a counter that each election
raises in the same transaction) and ``plan`` (the last view). Publishing is a transaction on the condition that the
leader's key is still the one that this election made. That is the whole fence: a coordinator that was stopped, or cut
off, and does not know of its successor yet, is refused there, and its views stay with it.

While etcd is away nobody can be elected, and the elected one stays in office and publishes nothing; it learns from etcd
when that is back whether the office is still its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from base64 import b64decode, b64encode
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from hashlib import sha256
from typing import Any
from zlib import compress, decompress
from zlib import error as ZlibError

from moering import protocol
from moering.admission import read_view
from moering.errors import ProtocolError
from moering.etcd import Cluster, Entry, Etcd, EtcdError, Map, created_at, modified_at, put
from moering.loop_thread import LoopThread
from moering.office import Deposed, Elected, Event, Published
from moering.protocol import MemberInfo, View

logger = logging.getLogger(__name__)

RETRY_S = 0.3
LOOK_S = 5.0
"""Who waits for the office looks at least so often whether it is vacant."""
MAX_VIEW_BYTES = 1_000_000
"""etcd takes requests of up to 1.5 MiB. Of a larger view only term, epoch and digest are published."""


@dataclass(frozen=True, slots=True)
class _Office:
    term: int
    lease: int
    revision: int  # at which the leader's key was made: what makes this election's key different from all others


class Election:
    """Stands for election again and again. `wake` is called, on a thread of its own, when `take` has something new."""

    def __init__(self, cluster: Cluster, candidate: MemberInfo, ttl_s: int, wake: Callable[[], None]) -> None:
        self._cluster, self._candidate, self._ttl_s, self._wake = cluster, candidate, ttl_s, wake
        self._leader, self._term, self._plan = (cluster.key(k) for k in ("leader", "term", "plan"))
        self._events: deque[Event] = deque()
        self._newest: View | None = None
        self._wanted = asyncio.Event()
        self._troubled = False
        self._thread = LoopThread("election", self._stand)

    def start(self) -> None:
        """Begin to stand for election."""
        self._thread.start()

    def take(self) -> list[Event]:
        """What happened since the last call."""
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def publish(self, view: View) -> None:
        """Publish `view`; if several wait, only the newest."""
        self._newest = view
        self._thread.call(self._wanted.set)

    def close(self) -> None:
        """Give the office up, so that another coordinator has it at once."""
        self._thread.close()

    async def _stand(self) -> None:
        async with Etcd(self._cluster.nodes) as etcd:
            while True:
                try:
                    office, view = await self._win(etcd)
                except EtcdError as e:
                    self._trouble(e, "no coordinator can be elected until it does")
                    await asyncio.sleep(RETRY_S)
                    continue
                await self._serve(etcd, office, view)

    async def _serve(self, etcd: Etcd, office: _Office, view: View | None) -> None:
        """From an election to the loss of the office."""
        self._troubled, self._newest = False, None
        self._emit(Elected(office.term, view))
        try:
            reason = await _first(self._keep(etcd, office), self._publish_all(etcd, office))
        finally:
            with contextlib.suppress(EtcdError):
                await etcd.revoke(office.lease)
        logger.warning("no longer the elected coordinator: %s; standing for election again", reason)
        self._emit(Deposed(reason))

    async def _win(self, etcd: Etcd) -> tuple[_Office, View | None]:
        """Wait until the office is vacant, and take it. Raises `EtcdError`; what it began then lapses by its lease."""
        known: bytes | None = None
        while True:
            leader, revision = await etcd.read(self._leader)
            if leader is not None:
                if leader.value != known:
                    logger.info("the elected coordinator is %s; waiting for its end", leader.value.decode())
                known = leader.value
                await etcd.wait_for_change(self._leader, revision + 1, LOOK_S)
                continue
            counter, _ = await etcd.read(self._term)
            plan, _ = await etcd.read(self._plan)
            term = 1 + (int(counter.value) if counter else 0)
            lease = await etcd.grant(self._ttl_s)
            won = await etcd.transact(
                [created_at(self._leader, 0), _as_read(self._term, counter), _as_read(self._plan, plan)],
                [put(self._leader, self._describe(term), lease), put(self._term, str(term).encode())],
            )
            if won.succeeded:
                logger.info("elected for term %d", term)
                return _Office(term, lease, won.revision), read_plan(plan)
            await etcd.revoke(lease)

    def _describe(self, term: int) -> bytes:
        own = self._candidate
        who = {"id": own.server_id, "incarnation": own.incarnation, "address": own.address}
        return json.dumps(who | {"term": term}).encode()

    async def _keep(self, etcd: Etcd, office: _Office) -> str:
        """Keep the office; returns why it is lost."""
        while True:
            await asyncio.sleep(self._ttl_s / 4)
            try:
                if not await etcd.keep_alive(office.lease):
                    return "its lease in etcd has lapsed"
                leader, _ = await etcd.read(self._leader)
            except EtcdError as e:
                self._trouble(e, "nothing is published until it does, and all go on with the last view")
                continue
            if leader is None or leader.created != office.revision:
                return "its key in etcd is gone"
            if self._troubled:
                logger.info("etcd answers again, and the office is still ours")
            self._troubled = False

    async def _publish_all(self, etcd: Etcd, office: _Office) -> str:
        """Publish the newest view each time there is one; returns when that is refused."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            view = self._newest
            if view is None or view.term < office.term:  # decided in an office that has been lost meanwhile
                continue
            writes = [put(self._plan, write_plan(view))]
            if view.term > office.term:  # members came with a later term than etcd knows: it was set up anew
                writes.append(put(self._term, str(view.term).encode()))
            try:
                done = await etcd.transact([created_at(self._leader, office.revision)], writes)
            except EtcdError as e:
                self._trouble(e, "nothing is published until it does, and all go on with the last view")
                await asyncio.sleep(RETRY_S)
                self._wanted.set()
                continue
            if not done.succeeded:
                return f"publishing epoch {view.epoch} of term {view.term} was refused"
            self._emit(Published(view))

    def _emit(self, event: Event) -> None:
        self._events.append(event)
        self._wake()

    def _trouble(self, error: EtcdError, consequence: str) -> None:
        if not self._troubled:
            logger.warning("etcd does not answer (%s): %s", error, consequence)
        self._troubled = True


def _as_read(key: str, entry: Entry | None) -> Map:
    """The condition that nobody has written `key` since `entry` was read."""
    return modified_at(key, 0 if entry is None else entry.modified)


async def _first(*coroutines: Coroutine[Any, Any, Any]) -> Any:
    """The result of whichever ends first; the others are cancelled."""
    tasks = [asyncio.create_task(c) for c in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def write_plan(view: View) -> bytes:
    """What the ``plan`` key holds: JSON with term, epoch, digest, and the whole view packed."""
    data = protocol.encode(view)
    packed = b64encode(compress(data)).decode()
    head = {"term": view.term, "epoch": view.epoch, "digest": sha256(data).hexdigest()}
    return json.dumps(head | ({"view": packed} if len(packed) <= MAX_VIEW_BYTES else {})).encode()


def read_plan(entry: Entry | None) -> View | None:
    """The view in the ``plan`` key; None where there is none, or one that is not what it was: members bring theirs."""
    if entry is None:
        return None
    try:
        plan = json.loads(entry.value)
        if "view" not in plan:
            return None
        data = decompress(b64decode(plan["view"]))
        if sha256(data).hexdigest() != plan["digest"]:
            raise ProtocolError("its digest differs")
        return read_view(data)
    except (ValueError, TypeError, KeyError, ZlibError, ProtocolError) as e:
        logger.warning("the plan in etcd cannot be used (%s); going by what members bring", e)
        return None
