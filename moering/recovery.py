"""How a new coordinator takes over: it waits for the members of the newest view that one of them has. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from moering.protocol import MemberInfo, View

PROOFS_KEPT_S = 60.0


class Recovery:
    """Active from the first view that a member brings until all of that view are back, or a lease has passed."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._view: View | None = None
        self._until_s = 0.0
        self._absent: dict[str, MemberInfo] = {}
        self._exits: dict[tuple[str, int], float] = {}  # (server id, pid) → when

    @property
    def active(self) -> bool:
        """Whether nothing may be published yet."""
        return self._view is not None

    def start(self, view: View, present: Iterable[str], now_s: float) -> None:
        """A member brought `view`; the newest counts."""
        if self._view is None:
            self._until_s = now_s + self._lease_s
        elif (view.term, view.epoch) <= (self._view.term, self._view.epoch):
            return
        self._view = view
        known = set(present)
        self._absent = {
            m.server_id: m
            for m in view.members
            if m.kind != "coordinator" and m.state != "OFFLINE" and m.server_id not in known
        }

    def back(self, server_id: str) -> None:
        """A member registered."""
        self._absent.pop(server_id, None)

    def proven_exit(self, server_id: str, pid: int, now_s: float) -> None:
        """A process is known to have exited; it need not be waited for."""
        self._exits = {k: s for k, s in self._exits.items() if now_s - s < PROOFS_KEPT_S}
        self._exits[server_id, pid] = now_s

    def shift(self, by_s: float) -> None:
        """The coordinator itself stood still."""
        self._until_s += by_s

    def done(self, now_s: float) -> bool:
        """Whether the waiting is over."""
        waited_for = [m for m in self._absent.values() if (m.server_id, m.pid) not in self._exits]
        return not waited_for or now_s >= self._until_s

    def finish(self) -> tuple[View, list[tuple[MemberInfo, float | None]]]:
        """The newest view, and who of it is absent, with the time of its exit where that is proven."""
        assert self._view is not None
        view, self._view = self._view, None
        return view, [(m, self._exits.get((m.server_id, m.pid))) for m in self._absent.values()]
