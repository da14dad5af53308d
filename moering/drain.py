"""How a process that is asked to go knows what to wait for, read from the view. Pure."""

from __future__ import annotations

import numpy as np

from moering.protocol import MemberInfo, View


def told_to_drain(view: View, own: MemberInfo) -> bool:
    """Whether an operation wants this very process to hand over its work and exit."""
    return any(op.drain.get(own.server_id) == own.incarnation for op in view.operations)


def experts_are_elsewhere(view: View, own: MemberInfo) -> bool:
    """Whether an expert server may exit: it is known to drain, and no router that is leased routes to it any more.

    The coordinator asks a draining server to hold an expert until all of that is true of it.
    """
    return _known_to_drain(view, own) and own.server_id in view.servers and not _target(view, own)


def requests_are_elsewhere(view: View | None, own: MemberInfo, queued: int, gateways: int) -> bool:
    """Whether a router may exit: it computes no request, and gets none any more. All know then that it drains, or none
    of the `gateways` is connected: while no coordinator publishes views, that is all it can go by."""
    return not queued and (not gateways or (view is not None and _known_to_drain(view, own)))


def nobody_needs(view: View, own: MemberInfo) -> bool:
    """Whether an expert server that drains waits in vain: nobody asks it, or nobody could take its experts."""
    others = [m for m in view.members if m.server_id != own.server_id]
    routers = any(m.kind == "router" and m.state != "OFFLINE" for m in others)
    takers = any(m.kind == "expert-server" and m.state in ("JOINING", "ONLINE") for m in others)
    return not routers or not takers


def another_serves(view: View, own: MemberInfo) -> bool:
    """Whether another process of the same kind could take over new work."""
    return any(m.kind == own.kind and m.state == "ONLINE" and m.server_id != own.server_id for m in view.members)


def _known_to_drain(view: View, own: MemberInfo) -> bool:
    wanted = own.server_id, own.incarnation, "DRAINING"
    return any((m.server_id, m.incarnation, m.state) == wanted for m in view.members)


def _target(view: View, own: MemberInfo) -> bool:
    return bool((np.frombuffer(view.target, "<i2") == view.servers.index(own.server_id)).any())
