"""Brings what is in memory into line with the plan: loads missing experts from the store, drops superfluous ones."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from expert_server.backend import NoRoom
from expert_server.residency import Key, Residency
from moering.protocol import View

logger = logging.getLogger(__name__)

REPORT_S = 0.25
"""Loaded experts are reported in batches; orphans, for which requests may wait, as soon as the last is there."""
PROGRESS_S = 10.0


class Loader:
    """Loads and drops the experts of one server. `reconcile` may run on one thread at a time."""

    def __init__(
        self,
        server_id: str,
        load: Callable[[int, int], tuple[Any, bytes]],
        residency: Residency,
        report: Callable[[], None],
        announce: Callable[[Sequence[Key]], None] = lambda keys: None,
        rest_s: Callable[[float], float] = lambda took_s: 0.0,
    ) -> None:
        """`load(layer, expert)` returns the expert and its content digest; `report` tells the coordinator; `announce`
        is told before each load which ones follow, so that they can be read meanwhile; `rest_s` says how long to rest
        after an expert that took so many seconds (`expert_server.pace`)."""
        self._server_id, self._load = server_id, load
        self._residency, self._report, self._announce, self._rest_s = residency, report, announce, rest_s
        self._view: View | None = None
        self._hurries = False  # joined for orphans, and has not everything yet
        self._changed = threading.Condition()

    def view_changed(self, view: View) -> None:
        """Take note of a newer view; a running `reconcile` turns to it after the expert in hand."""
        with self._changed:
            self._view = view
            self._changed.notify_all()

    def wait_for_change(self, known: View | None) -> View | None:
        """Block until there is a view other than `known`, and return it."""
        with self._changed:
            self._changed.wait_for(lambda: self._view is not known)
            return self._view

    def reconcile(self, view: View, *, online: bool) -> bool:
        """Drop and load until memory matches the plan of `view`. False if a newer view, or lack of room, cut it short.

        `online`: report on the way, since what is reported is used at once. A server that joins reports once. Where
        there are orphans, it loads only those that it is the first to bring: it is needed before it has everything.
        There is no rest after an orphan, nor, where a server joined for orphans, before it has everything. A view that
        does not know this server says nothing about what it should hold.
        """
        if self._server_id not in view.servers:
            return True
        given = targets(view, self._server_id)
        wanted, orphans, held = given.wanted, given.orphans, self._residency.keys()
        for key in sorted(held - wanted):
            self._residency.drop(key)
        if held - wanted:
            logger.info("dropped %d experts", len(held - wanted))
            self._report()
        if not online:
            self._hurries = bool(orphans)
        missing = given.in_order(given.needed(online) - held)
        if missing:
            logger.debug("loading %d experts, %d of them orphans", len(missing), len(orphans & set(missing)))
        done = self._load_all(missing, given, online)
        if online and done:
            self._hurries = False
        return done

    def _load_all(self, missing: list[Key], given: Targets, online: bool) -> bool:
        started = reported = shown = time.monotonic()
        for n in range(1, len(missing) + 1):
            newest = self._newest(given)
            if newest.asks_for_more_than(given):
                self._report()
                return False
            if newest is not given:  # what was an orphan may be none any more
                given, missing[n - 1 :] = newest, newest.in_order(missing[n - 1 :])
            key = missing[n - 1]
            begun = time.monotonic()
            self._announce(missing[n - 1 :])
            try:
                self._residency.add(key, *self._load(*key))
            except NoRoom as e:
                logger.warning("%s; %d experts of the plan wait for the next one", e, len(missing) - n + 1)
                self._report()
                return False
            now = time.monotonic()
            waited_for = n < len(missing) and given.urgency(key) > given.urgency(missing[n])
            if n == len(missing) or (online and (waited_for or now - reported > REPORT_S)):
                self._report()
                reported = now
            if now - shown > PROGRESS_S:
                logger.info("loaded %d of %d experts", n, len(missing))
                shown = now
            if n < len(missing) and key not in given.orphans and not self._hurries:
                self._rest(given, self._rest_s(now - begun))
        if missing:
            level = logging.INFO if online else logging.DEBUG  # one that joins says next that it is online
            logger.log(level, "loaded %d experts in %.1f s", len(missing), time.monotonic() - started)
        return True

    def rest(self, view: View, took_s: float) -> bool:
        """Rest after background work that took `took_s`; False when there is a newer view to turn to."""
        with self._changed:
            return not self._changed.wait_for(lambda: self._view is not view, self._rest_s(took_s))

    def _rest(self, given: Targets, seconds: float) -> None:
        """Wait, but no longer than until a newer view asks for something else."""
        with self._changed:
            self._changed.wait_for(lambda: self._newest(given).asks_for_more_than(given), seconds)

    def _newest(self, given: Targets) -> Targets:
        view = self._view
        return given if view is None or view is given.view else targets(view, self._server_id)


class Targets(NamedTuple):
    """What the plan of a view gives to a server."""

    view: View
    wanted: set[Key]
    orphans: set[Key]  # those that no live server has
    first: set[Key]  # orphans for which the plan names this server before others: so each is brought by one first

    def urgency(self, key: Key) -> int:
        """What is to be loaded before what: 2, 1, 0."""
        return (key in self.orphans) + (key in self.first)

    def needed(self, online: bool) -> set[Key]:
        """What to load now: where there are orphans, a server that joins begins with those that it is first for."""
        return self.wanted if online or not self.orphans else self.first

    def in_order(self, keys: Collection[Key]) -> list[Key]:
        """The most urgent first, then the most popular."""
        view = self.view
        ranks = view.popularity or bytes(view.layers * view.experts)
        return sorted(keys, key=lambda key: (-self.urgency(key), -ranks[key[0] * view.experts + key[1]], key))

    def asks_for_more_than(self, earlier: Targets) -> bool:
        """Whether other experts are wanted than by an earlier view, or more of them at once."""
        return self.wanted != earlier.wanted or not (self.orphans <= earlier.orphans and self.first <= earlier.first)


def targets(view: View, server_id: str) -> Targets:
    """What `view` gives to a server; nothing if it does not know it."""
    if server_id not in view.servers:
        return Targets(view, set(), set(), set())
    shape = (view.layers, view.experts, view.width)
    holds = np.frombuffer(view.target, "<i2").reshape(shape) == view.servers.index(server_id)
    nowhere = (np.frombuffer(view.routing, "<i2").reshape(shape) < 0).all(axis=2)
    wanted = holds.any(axis=2)
    return Targets(view, _keys(wanted), _keys(wanted & nowhere), _keys(holds[:, :, :1].any(axis=2) & nowhere))


def _keys(mask: np.ndarray) -> set[Key]:
    return {(int(layer), int(expert)) for layer, expert in np.argwhere(mask)}
