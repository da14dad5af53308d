"""The facts that operations go by, read from the coordinator's roster and placement. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from moering.placement import Placement
from moering.protocol import MemberInfo
from moering.roster import Roster


class ClusterFacts:
    """The cluster at this moment; see `moering.operations.facts.Facts`."""

    def __init__(
        self, own: MemberInfo, roster: Roster, placement: Placement | None, survivable: int, deaths: Mapping[str, int]
    ) -> None:
        """`survivable`: the failures of expert servers that the published view survives."""
        self._own, self._roster, self._placement = own, roster, placement
        self._survivable, self._deaths = survivable, deaths

    @property
    def launcher(self) -> MemberInfo | None:
        """The launcher that starts what is to be started, if the cluster has one."""
        return next(iter(self.of_kind("launcher")), None)

    @property
    def launcher_epoch(self) -> int:
        """The newest epoch that every launcher has acknowledged."""
        return min((r.acknowledged for r in self._roster.alive("launcher")), default=0)

    @property
    def settled(self) -> bool:
        """Whether as many failures are survived as the plan provides for."""
        return self._placement is None or self._survivable >= self._placement.planned_survivable()

    def member(self, server_id: str) -> MemberInfo | None:
        """The living process with this id."""
        if server_id == self._own.server_id:
            return self._own
        record = self._roster.records.get(server_id)
        return record.info if record is not None and record.alive else None

    def of_kind(self, kind: str) -> Sequence[MemberInfo]:
        """The living processes of a kind."""
        if kind == self._own.kind:
            return [self._own]
        return [r.info for r in self._roster.alive(kind)]

    def floor(self) -> int:
        """The failures of expert servers that an operation starting now must leave survivable."""
        if self._placement is None:
            return 0
        return min(self._placement.replication - 1, self._placement.planned_survivable())

    def refusal(self, server_ids: Iterable[str], floor: int) -> str | None:
        """Why the cluster cannot do without these processes."""
        leaving = set(server_ids)
        for kind in ("router", "gateway"):
            here = self.of_kind(kind)
            staying = [m for m in here if m.state == "ONLINE" and m.server_id not in leaving]
            if not staying and any(m.server_id in leaving for m in here):
                return f"no other {kind} is ONLINE: requests would have nowhere to go"
        if not leaving.isdisjoint(m.server_id for m in self.of_kind("expert-server")) and self._placement is not None:
            return self._placement.refusal_without(leaving, floor)
        return None

    def deaths(self, server_id: str) -> int:
        """How often a process with this id died since the operation began."""
        return self._deaths.get(server_id, 0)
