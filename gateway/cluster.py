"""What the gateway knows of the cluster: the last view, and whether it may accept requests."""

from __future__ import annotations

import asyncio
from array import array
from typing import Any

from moering.protocol import MemberInfo, View


class Cluster:
    """The last view of the coordinator, applied on the event loop."""

    def __init__(self) -> None:
        self.view: View | None = None
        self.seen = asyncio.Event()  # there is a view
        self.covered = False  # all experts were routed at least once
        self.told_to_leave = asyncio.Event()  # an operation wants this process to go
        self.leaving = False  # this process is on its way out: it serves whom it is connected to
        self.draining = False  # it takes no more requests

    def apply(self, view: View) -> None:
        """Take a newer view."""
        self.view = view
        self.seen.set()
        self.covered = self.covered or all_routed(view)

    def status(
        self, own: MemberInfo, router_counters: dict[str, float], passed_over: dict[str, dict[str, str]]
    ) -> dict[str, Any]:
        """The JSON of `moering status`; `own` is this process as it sees itself, now."""
        view = self.view
        members = [] if view is None else view.members
        others = [m for m in members if m.kind != "launcher" and (m.kind, m.server_id) != (own.kind, own.server_id)]
        return {
            "epoch": 0 if view is None else view.epoch,
            "processes": [_process(m) | {"passed_over": passed_over.get(m.server_id, {})} for m in [own, *others]],
            "failures_survivable": -1 if view is None else view.failures_survivable,
            "failures_restorable": -1 if view is None else view.failures_restorable,
            "orphans": 0 if view is None else view.orphans,
            "under_target": 0 if view is None else view.under_target,
            "router_counters": router_counters,
        }

    def gauges(self) -> dict[str, float]:
        """The view's numbers, for metrics."""
        if self.view is None:
            return {}
        online = [m for m in self.view.members if m.kind == "expert-server" and m.state == "ONLINE"]
        return {
            "epoch": self.view.epoch,
            "expert_servers_live": len(online),
            "failures_survivable": self.view.failures_survivable,
            "failures_restorable": self.view.failures_restorable,
            "replicas_under_target": self.view.under_target,
            "experts_orphaned": self.view.orphans,
        }


def all_routed(view: View) -> bool:
    """Whether each expert of each layer has a replica to route to."""
    pairs = view.layers * view.experts
    if pairs <= 0 or view.width <= 0 or len(view.routing) != 2 * pairs * view.width:
        return False
    return min(array("h", view.routing)[:: view.width]) >= 0


def _process(member: MemberInfo) -> dict[str, Any]:
    return {
        "id": member.server_id,
        "kind": member.kind,
        "pid": member.pid,
        "state": member.state,
        "incarnation": member.incarnation,
        "address": member.address,
        "experts": member.experts,
        "zone": member.zone,
    }
