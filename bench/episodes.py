"""One injected fault and what the cluster's status showed after it, until everything was as before."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import aiohttp

from bench.cluster import Event, Process, Status, kill, read_events, read_status
from moering.errors import MoeringError


@dataclass
class Watcher:
    """Reads the status again and again and keeps every answer. While nobody answers there are none."""

    session: aiohttp.ClientSession
    url: str
    period_s: float
    history: list[Status] = field(default_factory=list)

    async def run(self) -> None:
        """Poll until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(self.period_s)

    async def look(self) -> None:
        """One look."""
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, MoeringError):
            self.history.append(await read_status(self.session, self.url))


@dataclass(frozen=True)
class Killed:
    """A process, and when it got its SIGKILL (`time.perf_counter`)."""

    process: Process
    at_s: float


@dataclass(frozen=True)
class Episode:
    """One fault: who was killed, the status right before, and all that was seen until the end of recovery.

    The times are seconds since the first kill, None where it was not seen; they cannot be finer than the polling.
    """

    killed: Sequence[Killed]
    before: Status
    after: Sequence[Status]
    wanted: int  # failures survivable when all is well
    streams: int  # under way at the kill, first token received
    events: Sequence[Event] = ()  # of the coordinator's timeline, until all was as before

    @property
    def start_s(self) -> float:
        """When the first process was killed."""
        return self.killed[0].at_s

    @property
    def end_s(self) -> float:
        """The last status of the episode."""
        return self.after[-1].at_s if self.after else self.start_s

    @property
    def noticed_s(self) -> float | None:
        """The status no longer showed the dead as they were, or showed less redundancy."""
        return self._first(lambda s: s.failures_survivable < self.wanted or any(self._gone(k, s) for k in self.killed))

    @property
    def rerouted_s(self) -> float | None:
        """Routers counted rows as sent to another replica; None where the status has no such counter."""
        return self._first(
            lambda s: sum(s.grown_since(self.before).get(n, 0) for n in ("rows_resent", "hedged_rows")) > 0
        )

    @property
    def replaced_s(self) -> float | None:
        """All that were killed were ONLINE again as new processes."""
        return self._first(self._all_replaced)

    @property
    def redundant_s(self) -> float | None:
        """Every expert had its replicas back: as many failures survivable as before, and so it stayed."""
        noticed_s = self.noticed_s
        low = [s.at_s for s in self.after if s.failures_survivable < self.wanted]
        if noticed_s is None or (low and low[-1] == self.end_s):
            return None
        after_s = low[-1] if low else self.start_s + noticed_s - 1e-9
        return next(s.at_s - self.start_s for s in self.after if s.at_s > after_s)

    @property
    def detected_s(self) -> float | None:
        """The coordinator knew that all of them were dead; by its timeline."""
        return self._last_event("member.offline")

    @property
    def reloaded_s(self) -> float | None:
        """All of them had loaded their experts again and served; by the coordinator's timeline."""
        return self._last_event("member.online")

    @property
    def over(self) -> bool:
        """Whether everything is as before the kill."""
        return self.replaced_s is not None and self.redundant_s is not None

    def counted(self) -> dict[str, int]:
        """By how much each counter of the routers grew, from before the kill to the end."""
        last = self.after[-1] if self.after else self.before
        return last.grown_since(self.before)

    @property
    def hit(self) -> bool | None:
        """Whether a dispatch was outstanding at the dead server; None where the status does not tell.

        One that was late, and answered by a replica before the connection broke, counts as a hedge and not as lost: a
        killed process gives its memory back before its sockets close.
        """
        counted = self.counted()
        if "dispatches_lost" not in counted:
            return None
        return counted["dispatches_lost"] + counted.get("hedges", 0) > 0

    def _first(self, condition: Callable[[Status], bool]) -> float | None:
        return next((s.at_s - self.start_s for s in self.after if condition(s)), None)

    def _last_event(self, type: str) -> float | None:
        """When the last of the killed had its first event of this type after its kill; None unless all had one."""
        firsts = [
            next((e.at_s for e in self.events if (e.type, e.subject) == (type, k.process.id) and e.at_s > k.at_s), None)
            for k in self.killed
        ]
        seen = [at_s for at_s in firsts if at_s is not None]
        return max(seen) - self.start_s if len(seen) == len(firsts) else None

    def _all_replaced(self, status: Status) -> bool:
        now = status.processes
        return all(
            k.process.id in now
            and now[k.process.id].state == "ONLINE"
            and now[k.process.id].incarnation != k.process.incarnation
            for k in self.killed
        )

    def _gone(self, killed: Killed, status: Status) -> bool:
        now = status.processes.get(killed.process.id)
        return now is None or now.state != "ONLINE" or now.incarnation != killed.process.incarnation


def choose_victims(status: Status, kinds: Sequence[str], rng: random.Random) -> list[Process]:
    """One online process for each of `kinds`, none twice; raises `MoeringError` when there are too few."""
    victims: list[Process] = []
    for kind in kinds:
        candidates = sorted((p for p in status.online(kind) if p not in victims), key=lambda p: p.id)
        if not candidates:
            raise MoeringError(f"the cluster has no {kind} online that could be killed")
        victims.append(rng.choice(candidates))
    return victims


async def inject(
    watcher: Watcher, kinds: Sequence[str], stagger_s: float, wanted: int, streams: int, deadline_s: float, seed: str
) -> Episode:
    """Kill one process of each kind, `stagger_s` apart; watch until all is as before or `deadline_s` have passed.

    Raises `MoeringError`, `aiohttp.ClientError` or `TimeoutError` when nobody can be chosen.
    """
    rng = random.Random(seed)
    before = await read_status(watcher.session, watcher.url)
    seen = len(watcher.history)
    killed: list[Killed] = []
    for process in choose_victims(before, kinds, rng):
        if killed:
            await asyncio.sleep(stagger_s)
        killed.append(Killed(process, kill(process)))
    while True:
        after = [s for s in watcher.history[seen:] if s.at_s > killed[-1].at_s]
        episode = Episode(killed, before, after, wanted, streams)
        if episode.over or time.perf_counter() > killed[0].at_s + deadline_s:
            events: list[Event] = []
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, MoeringError):  # the gateway may be dead too
                events = await read_events(watcher.session, watcher.url, killed[0].at_s)
            return replace(episode, events=events)
        await asyncio.sleep(watcher.period_s)
