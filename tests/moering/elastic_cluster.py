"""A cluster without processes whose members and launcher do what operations ask for, on a clock of ours."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moering.drain import experts_are_elsewhere, told_to_drain
from moering.membership import Membership
from moering.protocol import MemberInfo, Operate, OperateAnswer, Operation, Register, View
from tests.moering.cluster import OWN, Cluster, Member

BYTES = 1000  # of one expert
START_S = 2.0  # from the start of a process to its registration


@dataclass
class Process(Member):
    """`stuck`: it does not react to being told to drain."""

    stuck: bool = False

    def info(self) -> MemberInfo:
        return self.register_plain().member

    def register_plain(self) -> Register:
        return Member.register(self)

    def register(self) -> Register:
        return replace(self.register_plain(), expert_bytes=BYTES)

    def take(self, message: object) -> list[object]:
        replies = super().take(message)
        if isinstance(message, View) and message is self.view and not self.stuck:
            told = told_to_drain(message, self.info())
            was = self.state
            if told and self.state == "ONLINE":
                self.state = "DRAINING"
            elif not told and self.state == "DRAINING":
                self.state = "ONLINE"
            replies += [self.lease()] if self.state != was else []
        return replies

    @property
    def finished(self) -> bool:
        """Whether it exits by itself now."""
        if self.view is None or not told_to_drain(self.view, self.info()) or self.stuck:
            return False
        return self.kind != "expert-server" or self.state == "JOINING" or experts_are_elsewhere(self.view, self.info())


class ElasticCluster(Cluster):
    """With a launcher that starts what is asked for, and starts again whoever exits."""

    def __init__(self, *members: Member, **rules: float) -> None:
        self.incarnations = 1
        self.retired: set[str] = set()
        self.starting: dict[str, tuple[str, float]] = {}  # id → kind, when it registers
        self.broken: set[str] = set()  # ids whose processes die before they serve
        self.slow: set[str] = set()  # ids whose processes load nothing
        super().__init__(*members, **rules)

    def start_coordinator(self) -> None:
        own = replace(OWN, incarnation=self.incarnations)
        self.coordinator = Membership(self.rules, own, self.now_s)
        self.incarnations += 1

    # --- what people do ---

    def ask(self, action: str, id: str = "op", **fields: object) -> OperateAnswer:
        ask = Operate(id, action, str(fields.pop("kind", "")), **fields)  # type: ignore[arg-type]
        (send,) = self.coordinator.handle(b"gateway", ask, self.now_s)
        answer = send.message  # type: ignore[union-attr]
        assert isinstance(answer, OperateAnswer)
        return answer

    @property
    def operation(self) -> Operation:
        """The newest operation, as members see it."""
        return self.published[-1].operations[-1]

    def until_over(self, within_s: float = 120.0) -> Operation:
        for _ in range(round(within_s * 5)):
            self.run(0.2)
            if self.published[-1].operations and self.operation.phase in ("done", "failed"):
                return self.operation
        raise AssertionError(f"still {self.operation}")

    def alive(self, kind: str) -> list[str]:
        return sorted(m.server_id for m in self.members.values() if m.kind == kind)

    # --- what the launcher and the processes do ---

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds * 10)):
            super().run(0.1)
            self._launch()
            for member in list(self.members.values()):
                if isinstance(member, Process) and member.finished:
                    self.exit(member.server_id)
            view = self.coordinator.view
            if view is not None and told_to_drain(view, self.coordinator.own):
                self.start_coordinator()

    def exit(self, server_id: str, *, orderly: bool = True) -> None:
        """A process leaves, or dies; the launcher notices and may start it again."""
        kind = self.members[server_id].kind
        if orderly:
            self.leave(server_id)
        else:
            self.kill(server_id)
        if server_id not in self.retired and "launcher" in self.members:
            self.starting.setdefault(server_id, (kind, self.now_s + START_S))

    def _launch(self) -> None:
        launcher = self.members.get("launcher")
        if launcher is None:
            return
        for op in [] if launcher.view is None else launcher.view.operations:
            self.retired = (self.retired | set(op.retire)) - set(op.start)
            for server_id in op.stop:
                self.starting.pop(server_id, None)
                if server_id in self.members:
                    self.leave(server_id)
            for server_id, kind in op.start.items():
                if server_id not in self.members:
                    self.starting.setdefault(server_id, (kind, self.now_s + START_S))
        for server_id, (kind, due_s) in list(self.starting.items()):
            if self.now_s >= due_s:
                del self.starting[server_id]
                self._register(server_id, kind)

    def _register(self, server_id: str, kind: str) -> None:
        self.incarnations += 1
        state = "JOINING" if kind == "expert-server" else "ONLINE"
        self.add(Process(kind, server_id, incarnation=self.incarnations, state=state, loading=False))
        if server_id in self.broken:
            self.exit(server_id, orderly=False)
        else:
            self.members[server_id].loading = server_id not in self.slow


def elastic(count: int = 3, routers: int = 1, capacity: int = 8, *, launcher: bool = True) -> ElasticCluster:
    """A cluster that has come up."""
    members = [Process("expert-server", f"expert-{i}", state="JOINING", capacity=capacity) for i in range(count)]
    members += [Process("router", f"router-{i}") for i in range(routers)]
    members += [Process("gateway", "gateway-0")]
    members += [Process("launcher", "launcher")] if launcher else []
    cluster = ElasticCluster(*members, expert_servers=count)
    cluster.run(5.0)
    assert cluster.view.failures_survivable == min(count, 2) - 1
    return cluster
