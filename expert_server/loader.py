"""Brings what is in memory into line with the plan: loads missing experts from the store, drops superfluous ones."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence, Set
from typing import Any

import numpy as np

from expert_server.backend import NoRoom
from expert_server.residency import Key, Residency
from moering.protocol import View

logger = logging.getLogger(__name__)

REPORT_S = 0.25
"""Loaded experts are reported in batches; orphans, for which requests may wait, as soon as the last is there."""
PROGRESS_S = 2.0


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

        `online`: report on the way, since what is reported is used at once. A server that is not online yet is used
        when it has everything, and so reports once. There is no rest after an orphan, nor after anything else that
        has to be there before an orphan can be used. A view that does not know this server says nothing about what
        it should hold.
        """
        if self._server_id not in view.servers:
            return True
        wanted, orphans = targets(view, self._server_id)
        held = self._residency.keys()
        for key in sorted(held - wanted.keys()):
            self._residency.drop(key)
        if held - wanted.keys():
            logger.info("dropped %d experts", len(held - wanted.keys()))
            self._report()
        missing = _in_order(view, wanted.keys() - held, orphans)
        if missing:
            logger.info("loading %d experts, %d of them orphans", len(missing), len(orphans & set(missing)))
        return self._load_all(view, missing, orphans, online)

    def _load_all(self, view: View, missing: list[Key], orphans: set[Key], online: bool) -> bool:
        started = reported = shown = time.monotonic()
        for n, key in enumerate(missing, 1):
            if self._is_outdated(view, orphans):
                self._report()
                return False
            begun = time.monotonic()
            self._announce(missing[n - 1 :])
            try:
                self._residency.add(key, *self._load(*key))
            except NoRoom as e:
                logger.warning("%s; %d experts of the plan wait for the next one", e, len(missing) - n + 1)
                self._report()
                return False
            now = time.monotonic()
            last_orphan = key in orphans and (n == len(missing) or missing[n] not in orphans)
            if n == len(missing) or (online and (last_orphan or now - reported > REPORT_S)):
                self._report()
                reported = now
            if now - shown > PROGRESS_S:
                logger.info("loaded %d of %d experts", n, len(missing))
                shown = now
            if n < len(missing) and key not in orphans and (online or not orphans):
                self._rest(view, orphans, self._rest_s(now - begun))
        if missing:
            logger.info("loaded %d experts in %.1f s", len(missing), time.monotonic() - started)
        return True

    def rest(self, view: View, took_s: float) -> bool:
        """Rest after background work that took `took_s`; False when there is a newer view to turn to."""
        with self._changed:
            return not self._changed.wait_for(lambda: self._view is not view, self._rest_s(took_s))

    def _rest(self, view: View, orphans: set[Key], seconds: float) -> None:
        """Wait, but no longer than until a newer view asks for something else."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_outdated(view, orphans), seconds)

    def _is_outdated(self, view: View, orphans: set[Key]) -> bool:
        """Whether a newer view asks for something else, or for something else first."""
        newest = self._view
        if newest is None or newest is view:
            return False
        wanted, new_orphans = targets(newest, self._server_id)
        return wanted != targets(view, self._server_id)[0] or not new_orphans <= orphans


def targets(view: View, server_id: str) -> tuple[dict[Key, None], set[Key]]:
    """The experts that the plan gives to a server, and those of them that no live server has (orphans)."""
    if server_id not in view.servers:
        return {}, set()
    shape = (view.layers, view.experts, view.width)
    target = np.frombuffer(view.target, "<i2").reshape(shape)
    routing = np.frombuffer(view.routing, "<i2").reshape(shape)
    mine = (target == view.servers.index(server_id)).any(axis=2)
    nowhere = mine & (routing < 0).all(axis=2)
    return _keys(mine), set(_keys(nowhere))


def _in_order(view: View, missing: Set[Key], orphans: Set[Key]) -> list[Key]:
    """Orphans first, then the most popular."""
    ranks = view.popularity or bytes(view.layers * view.experts)
    return sorted(missing, key=lambda key: (key not in orphans, -ranks[key[0] * view.experts + key[1]], key))


def _keys(mask: np.ndarray) -> dict[Key, None]:
    return {(int(layer), int(expert)): None for layer, expert in np.argwhere(mask)}
