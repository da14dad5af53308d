"""The coordinator under any order of events: what must hold in every view that it ever publishes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from moering.protocol import View
from tests.moering.cluster import EXPERTS, LAYERS, Cluster, Member, of, running

SERVERS = ("e0", "e1", "e2", "e3")
events = st.tuples(
    st.sampled_from(
        (
            "kill",
            "vanish",
            "restart",
            "leave",
            "drain",
            "undrain",
            "mute",
            "unmute",
            "slow",
            "fast",
            "coordinator",
            "router",
        )
    ),
    st.sampled_from(SERVERS),
    st.sampled_from((0.0, 0.2, 1.1, 6.0, 13.0)),
)


class Watched(Cluster):
    """Checks every view against what the members really are at that moment."""

    def check(self, view: View) -> None:
        alive = {m.server_id: m for m in view.members if m.state != "OFFLINE"}
        for server_id in view.servers:
            routed = of(view, "routing", server_id)
            if routed:
                assert alive[server_id].state in ("ONLINE", "DRAINING")
                assert routed <= self.reported(server_id)
            # What is routed to is never asked to be dropped, and no live replica is before another one is there.
            assert routed <= of(view, "target", server_id)
        for layer in range(view.layers):
            for expert in range(view.experts):
                live = [s for s in view.servers if (layer, expert) in self.reported(s) and alive[s].state != "JOINING"]
                assert bool(live) == any((layer, expert) in of(view, "routing", s) for s in view.servers)

    def reported(self, server_id: str) -> set[tuple[int, int]]:
        """What the coordinator was last told that a living server holds."""
        member = self.members.get(server_id)
        known = self.coordinator.roster.records.get(server_id)
        if known is None or not known.alive or self.coordinator.placement is None:
            return set()
        if member is not None and member.registered and member.incarnation == known.info.incarnation:
            assert known.info.experts == len(member.held)
        server = self.coordinator.placement.servers[server_id]
        return {(layer, e) for layer in range(LAYERS) for e in range(EXPERTS) if server.held[layer, e]}

    def act(self, actions: list) -> None:
        seen = len(self.published)
        before = self.published[-1:]
        fresh = [a.message for a in actions if isinstance(getattr(a, "message", None), View)]
        if fresh and fresh[-1:] != before:
            assert all(v is fresh[0] for v in fresh)  # one view for all
            if before and seen:
                assert (fresh[0].term, fresh[0].epoch) > (before[0].term, before[0].epoch) or fresh[0].layers == 0
            self.check(fresh[0])
        super().act(actions)


def apply(c: Cluster, event: str, server_id: str, incarnation: int) -> None:
    member = c.members.get(server_id)
    if event == "coordinator":
        c.start_coordinator()
    elif event == "router":
        c.kill("r0") if "r0" in c.members else c.add(Member("router", "r0", incarnation=incarnation))
    elif event == "restart":
        c.add(Member("expert-server", server_id, incarnation=incarnation, state="JOINING"))
    elif member is None:
        return
    elif event in ("kill", "vanish"):
        c.kill(server_id, proven=event == "kill")
    elif event == "leave":
        c.leave(server_id)
    elif event in ("drain", "undrain"):
        member.state = "DRAINING" if event == "drain" else "ONLINE"
    elif event in ("mute", "unmute"):
        member.silent = event == "mute"
    else:
        member.loading = event == "fast"


@settings(max_examples=100, deadline=None)
@given(st.lists(events, max_size=12), st.booleans())
def test_every_view_is_true_and_all_ends_well(schedule: list[tuple[str, str, float]], tight: bool) -> None:
    c = running(4, routers=2, capacity=4 if tight else 8, kind=Watched)
    for number, (event, server_id, seconds) in enumerate(schedule):
        apply(c, event, server_id, number + 2)
        c.run(seconds)
    for number, server_id in enumerate(SERVERS):  # repair everything: the cluster must come back by itself
        member = c.members.get(server_id)
        if member is None:
            c.add(Member("expert-server", server_id, incarnation=100 + number, state="JOINING"))
        else:
            member.silent, member.loading = False, True
            member.state = "ONLINE" if member.state == "DRAINING" else member.state
            member.view, member.acknowledged = None, (0, 0)  # as if it had missed the last one
    c.run(40)
    view = c.view
    assert (view.orphans, view.under_target, view.failures_survivable) == (0, 0, 1)
    assert {m.state for m in view.members if m.server_id in SERVERS} == {"ONLINE"}
    for server_id in SERVERS:
        assert c.members[server_id].held == of(view, "target", server_id) == of(view, "routing", server_id)
        assert len(c.members[server_id].held) <= c.members[server_id].capacity
