"""What all members of the cluster share: the way to the coordinator, around the real `LeaseSession`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moering.lease import RENEW_S
from moering.lease_session import LeaseSession
from moering.protocol import Lease, MemberInfo, Register, View
from tests.simulation.network import End
from tests.simulation.world import Process

if TYPE_CHECKING:
    from tests.simulation.cluster import Cluster

COORDINATOR = "coordinator"
CONTROL_HEARTBEAT_S, DATA_HEARTBEAT_S, ROUTER_HEARTBEAT_S = 5.0, 0.3, 3.0
MODEL, DIGEST, FINGERPRINT = "model", "digest", "fingerprint"


class ControlLink:
    """A DEALER that reconnects: what is sent while there is no connection goes out with the next one."""

    def __init__(self, process: Process, cluster: Cluster) -> None:
        self._process, self._cluster = process, cluster
        self._unsent: list[Any] = []
        self.end: End | None = None
        self.connect()

    def connect(self) -> None:
        """Try once; `lost` tries again."""
        self.end = self._cluster.network.connect(self._process, COORDINATOR, CONTROL_HEARTBEAT_S)
        if self.end.peer is not None:
            unsent, self._unsent = self._unsent, []
            for message in unsent:
                self.end.send(message)

    def send(self, message: Any) -> None:
        """Send or queue."""
        if self.end is not None and self.end.peer is not None:
            self.end.send(message)
        elif len(self._unsent) < 1000:
            self._unsent.append(message)

    def lost(self, end: End) -> bool:
        """Whether it was this connection; it will be made again."""
        if end is not self.end:
            return False
        self.end = None
        self._process.after(0.1 + 0.9 * self._cluster.world.rng.random(), self.connect)
        return True


class Member(Process):
    """A gateway, a router or an expert server."""

    kind = ""
    state = "ONLINE"

    def __init__(self, cluster: Cluster, server_id: str, incarnation: int) -> None:
        super().__init__(cluster.world, server_id)
        self.cluster, self.incarnation = cluster, incarnation
        self.address = f"{server_id}/{incarnation}"
        self.pid = incarnation
        self.view: View | None = None
        self.refused = ""
        self.progress = 0
        self.queued = 0
        cluster.network.processes[self.address] = self
        self._renewal = 0
        self.session = LeaseSession(self.register, self.lease, self._take_view, self._on_refused)
        self.control: ControlLink | None = None  # once it joins

    def join(self) -> None:
        """Begin to register."""
        self.control = ControlLink(self, self.cluster)
        self._renew(0)

    def renew(self) -> None:
        """Send a lease now instead of at the next second."""
        self._renew(self._renewal)

    def _renew(self, number: int) -> None:
        if number == self._renewal:
            self._renewal += 1
            for message in self.session.renewal():
                self.control.send(message)
            self.after(RENEW_S, self._renew, self._renewal)

    def received(self, end: End, message: Any) -> None:
        """What the coordinator says is for the session."""
        if self.session.take(message):
            self.renew()

    def is_control(self, end: End) -> bool:
        """Whether it is the connection to the coordinator."""
        return self.control is not None and end is self.control.end

    def lost(self, end: End) -> None:
        """Another connection than the control's is the subclass's."""
        if self.control is not None:
            self.control.lost(end)

    def register(self) -> Register:
        """As of now."""
        info = MemberInfo(
            self.kind, self.name, self.incarnation, self.address, self.pid, self.state, "", self.capacity, 0
        )  # fmt: skip
        cluster, server = self.cluster, self.kind == "expert-server"
        shape = (0, 0) if self.kind == "gateway" else (cluster.size.layers, cluster.size.experts)
        digest = "" if self.kind == "gateway" else DIGEST
        return Register(info, MODEL, digest, *shape, FINGERPRINT if server else "", self.held(), None)

    @property
    def capacity(self) -> int:
        """Replicas that fit; 0 for all but expert servers."""
        return 0

    def held(self) -> bytes:
        """What an expert server holds, packed."""
        return b""

    @property
    def suspects(self) -> list[str]:
        """Servers that a router routes around."""
        return []

    @property
    def applied(self) -> tuple[int, int]:
        """(term, epoch) of the view that the main loop goes by."""
        return (0, 0) if self.view is None else (self.view.term, self.view.epoch)

    def lease(self) -> Lease:
        """As of now."""
        return Lease(
            self.name, self.incarnation, self.state, self.progress, self.queued, self.suspects, *self.applied, b""
        )

    def _take_view(self, view: View) -> None:
        self.cluster.oracle.view_applied(self, view)
        self.view = view
        self.view_changed(view)

    def view_changed(self, view: View) -> None:
        """Go by a newer view."""

    def _on_refused(self, reason: str) -> None:
        self.refused = reason
        self.world.note(f"{self.address} is refused: {reason}")
        self.cluster.leave(self)
