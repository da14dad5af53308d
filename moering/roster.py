"""The list of all members: who is known, who looks dead, who is forgotten. Pure: `now_s` is an argument."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

from moering.actions import Probe, Rules
from moering.protocol import MemberInfo
from moering.records import SUSPECTED_S, Record, braked, examine

logger = logging.getLogger(__name__)

OWN_PAUSE_S = 1.0
REMEMBER_DEAD_S = 60.0
PROBED = ("expert-server", "router")
"""Those with an endpoint of ours that can be asked."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a look at all members found."""

    dead: list[tuple[Record, str]]
    """To be buried, with the reason."""
    doubtful: set[str]
    """Look dead, but so many at once that it may be the coordinator that is cut off."""
    probes: list[Probe]


class Roster:
    """All records by server id."""

    def __init__(self, rules: Rules, now_s: float) -> None:
        self._rules = rules
        self.records: dict[str, Record] = {}
        self._last_tick_s = now_s
        self._braked: set[str] = set()

    def alive(self, kind: str | None = None) -> Iterator[Record]:
        """The members (of a kind)."""
        return (r for r in self.records.values() if r.alive and kind in (None, r.info.kind))

    def known(self, server_id: str, incarnation: int) -> Record | None:
        """The living member with this id and incarnation."""
        record = self.records.get(server_id)
        return record if record is not None and record.alive and record.info.incarnation == incarnation else None

    def infos(self) -> list[MemberInfo]:
        """All of them, the recently dead included, in the order of their ids."""
        return [r.info for _, r in sorted(self.records.items())]

    def own_pause(self, now_s: float) -> float:
        """How long this process stood still before this tick; leases and suspicions are put off by it."""
        pause = now_s - self._last_tick_s
        self._last_tick_s = now_s
        if pause <= OWN_PAUSE_S:
            return 0.0
        logger.warning("this coordinator stood still for %.1f s; all leases are extended by it", pause)
        for record in self.records.values():
            record.shift(pause)
        return pause

    def bury(self, record: Record, reason: str, *, proven: bool, now_s: float) -> bool:
        """`record` is dead. True if its share of the experts is to be kept for it for a while."""
        info = record.info
        record.info, record.died_s = replace(info, state="OFFLINE", experts=0), now_s
        grace = proven and info.kind == "expert-server" and self._rules.rejoin_grace_s > 0
        grace = grace and info.state != "DRAINING"  # that one is not awaited
        record.grace_until_s = now_s + self._rules.rejoin_grace_s if grace else None
        decision = f"its share waits {self._rules.rejoin_grace_s:g} s for it" if grace else "going on without it"
        logger.warning("%s %s (pid %d) is OFFLINE: %s; %s", info.kind, info.server_id, info.pid, reason, decision)
        return grace

    def judge(self, now_s: float) -> Verdict:
        """Who is dead by lease and suspicion, with the brake applied to each kind of process."""
        evidence = examine(self.records.values(), self._rules.lease_s, now_s)
        dead = [self.records[i] for i in evidence.dead]
        held_back = braked([*dead, *evidence.late], self.records.values()) & {r.info.kind for r in dead}
        for kind in held_back - self._braked:
            logger.warning("many of kind %s look dead without proof (%s); forgetting none", kind, evidence.dead)
        self._braked = held_back
        doubtful = [r for r in dead if r.info.kind in held_back]
        # Nothing is held against those in doubt, but a refused connection would be a proof.
        ask = [r for r in doubtful if r.info.kind in PROBED and now_s - r.probed_s >= SUSPECTED_S]
        probe = [*evidence.probe, *ask]
        for record in probe:
            record.probed_s = now_s
        return Verdict(
            [(r, evidence.dead[r.info.server_id]) for r in dead if r.info.kind not in held_back],
            {r.info.server_id for r in doubtful},
            [Probe(r.info.server_id, r.info.incarnation, r.info.address) for r in probe],
        )

    def grace_ended(self, now_s: float) -> list[str]:
        """The expert servers that did not come back in time."""
        ended = []
        for server_id, record in self.records.items():
            if not record.alive and record.grace_until_s is not None and now_s >= record.grace_until_s:
                record.grace_until_s = None
                logger.info("%s did not come back; planning without it", server_id)
                ended.append(server_id)
        return ended

    def forget(self, now_s: float) -> bool:
        """Forget those who are dead for long. True if there were any."""
        old = [i for i, r in self.records.items() if not r.alive and now_s - r.died_s >= REMEMBER_DEAD_S]
        old = [i for i in old if self.records[i].grace_until_s is None]
        for server_id in old:
            del self.records[server_id]
        return bool(old)
