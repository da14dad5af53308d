"""Which router computes what: connections to all routers of the view, and the way of each record to one of them.

A record goes to the router with the least outstanding work, or to one near it that was sent the same prefix before.
When that router is lost (disconnected, stuck, gone from the view, restarted) the record goes to another one with what
the client already has, or is held until there is one, bounded by its deadline.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import zmq

from gateway.affinity import Affinity
from gateway.journal import Journal, Record
from gateway.router_link import RouterLink
from moering import transport
from moering.errors import HandshakeError
from moering.prefix import prefix_keys
from moering.protocol import Abort, Failed, Hello, MemberInfo, PromptLogprobs, RouterStats, Submit, Token, Tokens

logger = logging.getLogger(__name__)

MAX_FRUITLESS_ATTEMPTS = 5
"""A request that outlives this many routers without one token is taken to be what kills them."""
RETRY_S = (0.05, 2.0)
"""First and longest pause before connecting to the same router again."""

Key = tuple[str, int]  # server id, incarnation


class RouterPool:
    """Owns the links and the open records' way; all methods must be called on the event loop."""

    def __init__(self, journal: Journal, hello: Hello) -> None:
        self._journal = journal
        self._hello = hello
        self._members: dict[Key, MemberInfo] = {}
        self._keepers: dict[Key, asyncio.Task[None]] = {}
        self._links: dict[Key, RouterLink] = {}
        self._affinity = Affinity()
        self._routes: dict[Record, RouterLink] = {}
        self._timers: dict[Record, asyncio.TimerHandle] = {}
        self._held: dict[Record, None] = {}  # an ordered set: first come, first served
        self._sockets = itertools.count(1)
        self.stats: dict[str, RouterStats] = {}  # the last of each router, by server id
        self.failovers = 0  # submissions that continued on another router or another connection

    def update(self, members: Iterable[MemberInfo]) -> None:
        """Apply the routers of a new view."""
        routers = {(m.server_id, m.incarnation): m for m in members if m.kind == "router" and m.address}
        self._members = {k: m for k, m in routers.items() if m.state in ("ONLINE", "DRAINING")}
        for key in [k for k in self._keepers if k not in self._members]:
            logger.info("router %s (incarnation %d) left the view", *key)
            self._keepers.pop(key).cancel()
            self._affinity.forget(key)
            self._drop(key, "it left the view")
        for key, member in self._members.items():
            if key not in self._keepers:
                keeper = asyncio.create_task(self._keep(key, member), name=f"router-{key[0]}")
                keeper.add_done_callback(partial(self._kept, key))
                self._keepers[key] = keeper
        self._submit_held()

    def router_counters(self) -> dict[str, float]:
        """The counters of all routers, summed up."""
        total: defaultdict[str, float] = defaultdict(float)
        for stats in self.stats.values():
            for name, value in stats.counters.items():
                total[name] += value
        return dict(total)

    def living_stats(self) -> dict[str, RouterStats]:
        """The last figures of each living router, by server id."""
        alive = {server_id for server_id, _ in self._members}
        return {server_id: stats for server_id, stats in self.stats.items() if server_id in alive}

    def router_gauges(self) -> dict[str, float]:
        """Of each gauge the largest value among the living routers: the fullest cache, the longest queue."""
        largest: dict[str, float] = {}
        for stats in self.living_stats().values():
            for name, value in stats.gauges.items():
                largest[name] = max(value, largest.get(name, value))
        return largest

    def passed_over(self) -> dict[str, dict[str, str]]:
        """By expert server: which living routers let others come first, and why."""
        reasons: defaultdict[str, dict[str, str]] = defaultdict(dict)
        for router, stats in self.living_stats().items():
            for server, why in stats.passed_over.items():
                reasons[server][router] = why
        return dict(reasons)

    @property
    def connected(self) -> int:
        """Routers that new requests can go to."""
        return len(self._usable())

    @property
    def held(self) -> int:
        """Records that wait for a router."""
        return len(self._held)

    def open(self, record: Record) -> None:
        """Start a record; its events go to its sink, the last of them within the deadline."""
        self._journal.add(record)
        loop = asyncio.get_running_loop()
        self._timers[record] = loop.call_at(record.deadline, self._expire, record)
        self._assign(record)

    def cancel(self, record: Record) -> None:
        """End a record that nobody waits for any more; nothing happens if it has ended."""
        if self._journal.close(record):
            self._abort(record)

    def fail_all(self, message: str) -> None:
        """End all open records with an error."""
        for record in self._journal.records():
            self._journal.fail(record, "overloaded", message)
            self._abort(record)

    async def close(self) -> None:
        """Drop all connections; open records end with an error."""
        self.fail_all("the server is shutting down")
        self._members.clear()
        keepers, self._keepers = list(self._keepers.values()), {}
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
        for link in self._links.values():
            link.close()
        self._links.clear()

    # --- records -----------------------------------------------------------------------------------------------------

    def _assign(self, *records: Record) -> None:
        """Send each record to a router, or hold it. A router gets all that are for it at once."""
        now = asyncio.get_running_loop().time()
        submits: defaultdict[RouterLink, list[Submit]] = defaultdict(list)
        for record in records:
            link = self._route(record)
            if link is not None:
                submits[link].append(record.next_submit(now))
        for link, messages in submits.items():
            link.send(*messages)  # if it fails, the lost link gives them back

    def _route(self, record: Record) -> RouterLink | None:
        """The router that the record goes to from now on; None where it is held, or given up."""
        usable = self._usable()
        if not usable:
            self._held[record] = None
            return None
        if record.fruitless >= MAX_FRUITLESS_ATTEMPTS:
            self._journal.fail(record, "poison", "the request was given up: each router that computed it was lost")
            self._forget(record)
            return None
        link = self._choose(record, usable)
        if record.attempt:
            self.failovers += 1
        self._held.pop(record, None)
        self._routes[record] = link
        link.records.add(record)
        return link

    def _choose(self, record: Record, usable: dict[Key, RouterLink]) -> RouterLink:
        prefixes = prefix_keys(record.prompt)
        key = self._affinity.choose(prefixes, {key: link.load for key, link in usable.items()})
        self._affinity.sent(prefixes, key)
        return usable[key]

    def _usable(self) -> dict[Key, RouterLink]:
        ready = ((key, self._members.get(key), link) for key, link in self._links.items() if link.ready)
        return {key: link for key, member, link in ready if member is not None and member.state == "ONLINE"}

    def _submit_held(self) -> None:
        self._assign(*self._held)

    def _expire(self, record: Record) -> None:
        self._journal.fail(record, "timeout", "the request took longer than the server's limit")
        self._abort(record)

    def _abort(self, record: Record) -> None:
        link = self._routes.get(record)
        self._forget(record)
        if link is not None:
            link.send(Abort(record.request_id, record.attempt))

    def _forget(self, record: Record) -> None:
        """Drop all that is kept for a record that has ended."""
        self._timers.pop(record).cancel()
        self._held.pop(record, None)
        link = self._routes.pop(record, None)
        if link is not None:
            link.records.discard(record)

    def _receive(self, link: RouterLink, message: Any) -> None:
        if isinstance(message, Tokens):
            for token in message.tokens:
                self._take(token)
        elif isinstance(message, PromptLogprobs):
            self._journal.take_prompt_logprobs(message)
        elif isinstance(message, Failed):
            ended = self._journal.take_failed(message)
            if ended is not None:
                self._forget(ended)
        elif isinstance(message, RouterStats):
            self.stats[message.server_id] = message
            outstanding = sum(message.gauges.get(name, 0) for name in ("requests_running", "requests_waiting"))
            link.others_load = max(0, int(outstanding) - len(link.records))
        else:
            logger.warning("dropped an unexpected %s message from a router", message.KIND)

    def _take(self, token: Token) -> None:
        try:
            ended = self._journal.take(token)
        except Exception:  # the record has the token, its client may not: neither to go on nor to wait is honest
            logger.exception("cannot hand on a token of request %s", token.request_id)
            self._fail_open(lambda r: r.request_id == token.request_id)
            return
        if ended is not None:
            self._forget(ended)

    def fail_stranded(self) -> None:
        """End, after an error in this process, the records that nothing would ever end but their deadline."""
        self._fail_open(lambda r: r not in self._held and (r not in self._routes or self._routes[r].closed))

    def _fail_open(self, which: Callable[[Record], bool]) -> None:
        for record in filter(which, self._journal.records()):
            self._journal.fail(record, "internal", "an internal error of the gateway")
            self._abort(record)

    # --- links -------------------------------------------------------------------------------------------------------

    async def _keep(self, key: Key, member: MemberInfo) -> None:
        """Stay connected to one incarnation of a router for as long as the view has it."""
        retry_s, longest_s = RETRY_S
        while True:
            reason, was_ready = await self._connect_once(key, member)
            if isinstance(reason, HandshakeError):
                logger.error("router %s at %s is not used: %s", member.server_id, member.address, reason)
                return
            retry_s = RETRY_S[0] if was_ready else min(2 * retry_s, longest_s)
            logger.debug("router %s at %s: %s; again in %.2f s", member.server_id, member.address, reason, retry_s)
            await asyncio.sleep(retry_s)

    def _kept(self, key: Key, keeper: asyncio.Task[None]) -> None:
        """A keeper ends by an error only through a bug: the next view starts another one."""
        if keeper.cancelled() or keeper.exception() is None:
            return
        logger.error("the connection to router %s cannot be kept", key[0], exc_info=keeper.exception())
        if self._keepers.get(key) is keeper:
            del self._keepers[key]
            self._drop(key, "an internal error")
        self.fail_stranded()

    async def _connect_once(self, key: Key, member: MemberInfo) -> tuple[Exception, bool]:
        """Hold one connection until it is lost: the reason, and whether it was ever usable."""
        loop = asyncio.get_running_loop()
        try:
            address = await loop.run_in_executor(None, transport.resolve, member.address)
        except (OSError, ValueError) as e:
            return e, False
        identity = f"{self._hello.server_id}/{self._hello.incarnation}/{next(self._sockets)}".encode()
        try:
            link = RouterLink(member, address, identity, self._hello, self._on_ready, self._receive)
        except zmq.ZMQError as e:  # for example too many open files
            return e, False
        self._links[key] = link
        reason = await link.lost
        self._drop(key, reason)
        return reason, link.welcomed

    def _on_ready(self, link: RouterLink) -> None:
        logger.info("connected to router %s at %s", link.member.server_id, link.member.address)
        self._submit_held()

    def _drop(self, key: Key, why: object) -> None:
        """Close a link; its records go on elsewhere, or are held."""
        link = self._links.pop(key, None)
        if link is None:
            return
        link.close()
        # A router catches up with them in this order: the shortest first, and the fewest wait for long.
        orphans, link.records = sorted(link.records, key=lambda r: len(r.prompt) + len(r.emitted)), set()
        for record in orphans:
            self._routes.pop(record)
        self._assign(*orphans)
        if link.welcomed:
            held = sum(record in self._held for record in orphans)
            logger.warning(
                "router %s was lost: %s; of its %d requests %d go on elsewhere, %d wait for a router",
                *(key[0], why, len(orphans), len(orphans) - held, held),
            )
