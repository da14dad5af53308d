"""The coordinator: the real `Membership` on virtual time and network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moering.actions import Action, Probe
from moering.errors import ProtocolError
from moering.membership import Membership
from moering.protocol import MemberInfo, Refused
from tests.simulation.member import COORDINATOR
from tests.simulation.network import End
from tests.simulation.world import Process

if TYPE_CHECKING:
    from tests.simulation.cluster import Cluster

TICK_S = 0.1
PROBE_TIMEOUT_S = 1.0


class Coordinator(Process):
    """Socket, probes and clock of one `Membership`."""

    def __init__(self, cluster: Cluster, incarnation: int) -> None:
        super().__init__(cluster.world, COORDINATOR)
        self.cluster, self.incarnation = cluster, incarnation
        own = MemberInfo(
            "coordinator", COORDINATOR, incarnation, COORDINATOR, incarnation, "ONLINE", "", 0, 0
        )  # fmt: skip
        self.membership = Membership(cluster.rules, own, self.world.now_s)
        cluster.network.processes[COORDINATOR] = self
        self._ends: dict[bytes, End] = {}
        self.after(TICK_S, self._tick)

    def received(self, end: End, message: Any) -> None:
        """A message of a member or of the launcher."""
        if end.label is None:
            end.label = b"%d" % len(self._ends)
            self._ends[end.label] = end
        self.take(end.label, message)

    def take(self, identity: bytes, message: Any) -> None:
        """Hand a message to the state machine, as the real shell does."""
        try:
            with self.cluster.oracle.watching(self, message):
                actions = self.membership.handle(identity, message, self.world.now_s)
        except ProtocolError as e:
            self.world.note(f"coordinator: bad message: {e}")
            end = self._ends.get(identity)
            if end is not None:
                end.send(Refused(str(e), fatal=False))
            return
        self._act(actions)

    def _tick(self) -> None:
        view = self.membership.view
        actions = self.membership.tick(self.world.now_s)
        if self.membership.view is not view:
            self.cluster.oracle.published(self, self.membership.view)
        self._act(actions)
        self.after(TICK_S, self._tick)

    def _act(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Probe):
                self._probe(action)
            else:
                end = self._ends.get(action.identity)
                if end is not None:
                    end.send(action.message)

    def _probe(self, probe: Probe) -> None:
        network, target = self.cluster.network, self.cluster.network.processes.get(probe.address)
        if network.blocked(self.name, probe.server_id) or network.blocked(probe.server_id, self.name):
            answer = "silent"
        elif target is None or not target.alive:
            answer = "refused"
        else:
            answer = "silent" if target.stopped else "answered"
        delay_s = PROBE_TIMEOUT_S if answer == "silent" else network.latency_s
        self.after(delay_s, self._probed, probe, answer)

    def _probed(self, probe: Probe, answer: str) -> None:
        self._act(self.membership.probe_result(probe.server_id, probe.incarnation, answer, self.world.now_s))
