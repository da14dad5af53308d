"""What a router believes of each expert server: suspicion, bans, ejection and their end.

Pure: no socket, no clock; time is an argument. A router acts on its belief within milliseconds, and takes it back as
fast. It changes no plan: that is the coordinator's part, on stronger evidence.

A server that is *late* (it owes an overdue answer) is passed over until it answers. One that is late again and again,
or takes several times as long as its peers, is *ejected*: passed over for a time that doubles with each ejection, then
probed with copies of real rows, whose answers nobody waits for, until it is as fast as its peers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

GOOD, DOUBTED, LATE, GONE = 0, 1, 2, 3
FIRST_BAN_S, LONGEST_BAN_S = 0.5, 30.0
EJECTING_STRIKES = 2
"""One late answer may happen to anybody."""
FORGIVE_S = 2.0
"""After so long in normal use one strike is forgotten."""
PROBES, PROBE_EVERY_S = 6, 0.03
FAST_ENOUGH = 2.0
"""An ejected server comes back when most of `PROBES` probes took at most so many times what they would take its peers.
Not their mean: probes are few, and one of them is sent to a process that slept, between others that compute."""
LONGEST_EJECTION_S = 8.0
"""Not longer, as probes cost next to nothing."""
WEDGED_S = 0.5
"""Having answered nothing for so long, though something is overdue, a server is wedged rather than slow."""
REPORTED_WEDGED_S = 1.0
"""The coordinator hears of it after so long."""


@dataclass(slots=True)
class Health:
    """One expert server as this router sees it."""

    connected: bool = False
    incarnation: int = 0
    banned_until_s: float = 0.0
    losses: int = 0  # in a row; a ban doubles with each
    answered_s: float = float("-inf")  # the last answer of any kind
    timely: bool = False  # that answer was in time
    late_since_s: float | None = None  # something is overdue there
    ejected: bool = False
    probe_at_s: float = float("inf")  # while ejected: the next probe
    strikes: float = 0.0
    _good_since_s: float = 0.0
    _probes: list[tuple[float, float]] = field(default_factory=list)  # (seconds, expected seconds)

    def lost(self, now_s: float) -> None:
        """The connection broke: nothing goes there until it is back, and for a growing time only as a last resort."""
        self.connected, self.late_since_s = False, None
        self.losses += 1
        self.banned_until_s = now_s + min(FIRST_BAN_S * 2 ** (self.losses - 2), LONGEST_BAN_S) * (self.losses > 1)

    def came_back(self, incarnation: int) -> None:
        """A connection is up. A new incarnation starts with a clean record."""
        if incarnation != self.incarnation:
            self.losses, self.banned_until_s, self.strikes, self.ejected = 0, 0.0, 0.0, False
        self.connected, self.incarnation, self.timely = True, incarnation, False
        self.probe_at_s = 0.0 if self.ejected else float("inf")

    def answered(self, timely: bool, now_s: float) -> None:
        """A reply arrived."""
        self.answered_s, self.timely = now_s, timely
        if self.losses:
            self.losses, self.banned_until_s = 0, 0.0

    # --- late and slow ---

    @property
    def late(self) -> bool:
        """Whether it owes something that is overdue."""
        return self.late_since_s is not None

    @property
    def well(self) -> bool:
        """Whether it keeps its deadlines, so that others have no excuse."""
        return self.connected and self.timely and self.late_since_s is None

    def overdue(self, now_s: float) -> bool:
        """Something that it owes is overdue. True if that is news."""
        if self.late:
            return False
        self.late_since_s = now_s
        self._strike(now_s)
        return True

    def caught_up(self, now_s: float) -> None:
        """Nothing is overdue any more."""
        self.late_since_s, self._good_since_s = None, now_s

    def wedged(self, since_s: float, now_s: float) -> bool:
        """Whether it has answered nothing since it got what was sent at `since_s`, and that is long ago."""
        return self.answered_s <= since_s and now_s - since_s >= WEDGED_S

    def is_wedged(self, now_s: float) -> bool:
        """The same for the coordinator: something is overdue for long, and nothing was answered since."""
        since_s = self.late_since_s
        return since_s is not None and self.answered_s <= since_s and now_s - since_s >= REPORTED_WEDGED_S

    def eject(self, now_s: float) -> None:
        """It is slow, compared with its peers."""
        self.strikes = max(self.strikes, EJECTING_STRIKES - 1)
        self._strike(now_s, forgiving=False)

    @property
    def may_be_probed(self) -> bool:
        """Whether probes decide about it. One that is late has to answer what it owes first."""
        return self.connected and self.ejected and not self.late

    def wants_probe(self, now_s: float) -> bool:
        """Whether one should be sent now."""
        return self.may_be_probed and now_s >= self.probe_at_s

    def probe_sent(self) -> None:
        """One at a time: the next one after the answer."""
        self.probe_at_s = float("inf")

    def probe_lost(self, now_s: float) -> None:
        """A probe came back without an answer: it lacks the expert."""
        self.probe_at_s = now_s + PROBE_EVERY_S

    def probed(self, took_s: float, expected_s: float, usual: float, now_s: float) -> None:
        """A probe was answered. `usual` is what its peers take, × expected."""
        if not self.ejected:
            return
        self._probes.append((took_s, expected_s))
        self.probe_at_s = now_s + PROBE_EVERY_S
        if len(self._probes) < PROBES:
            return
        fast = sum(took <= FAST_ENOUGH * usual * expected for took, expected in self._probes)
        self._probes.clear()
        if 2 * fast > PROBES:
            self.ejected, self.probe_at_s, self._good_since_s = False, float("inf"), now_s
        else:
            self._strike(now_s)

    def _strike(self, now_s: float, *, forgiving: bool = True) -> None:
        if forgiving and not self.ejected:
            self.strikes = max(0.0, self.strikes - (now_s - self._good_since_s) / FORGIVE_S)
        self.strikes += 1
        self._good_since_s = now_s
        if self.strikes >= EJECTING_STRIKES:
            ban_s = min(FIRST_BAN_S * 2 ** int(self.strikes - EJECTING_STRIKES), LONGEST_EJECTION_S)
            self.ejected, self.probe_at_s = True, now_s + ban_s
            self._probes.clear()

    def complaint(self, now_s: float) -> str:
        """Why others come first, for people; empty: they do not."""
        if not self.connected:
            return "unreachable"
        if self.late:
            return "late"
        return "slow" if self.ejected else "banned" if now_s < self.banned_until_s else ""

    def rank(self, now_s: float) -> int:
        """GOOD before DOUBTED (used when every other holder is worse) before LATE before GONE."""
        if not self.connected:
            return GONE
        if self.late:
            return LATE
        return DOUBTED if self.ejected or now_s < self.banned_until_s else GOOD


def rank_all(servers: list[str], health: Mapping[str, Health], now_s: float) -> np.ndarray:
    """`Health.rank` of every server of a view, GONE for those never connected to."""
    return np.array([health[s].rank(now_s) if s in health else GONE for s in servers], dtype=np.int64)
