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
    known = _own_entry(view, own)
    return known is not None and known.state == "DRAINING" and own.server_id in view.servers and not _target(view, own)


def nobody_needs(view: View, own: MemberInfo) -> bool:
    """Whether an expert server that drains waits in vain: nobody asks it, or nobody could take its experts."""
    others = [m for m in view.members if m.server_id != own.server_id]
    routers = any(m.kind == "router" and m.state != "OFFLINE" for m in others)
    takers = any(m.kind == "expert-server" and m.state in ("JOINING", "ONLINE") for m in others)
    return not routers or not takers


def another_serves(view: View, own: MemberInfo) -> bool:
    """Whether another process of the same kind could take over new work."""
    return any(m.kind == own.kind and m.state == "ONLINE" and m.server_id != own.server_id for m in view.members)


def _own_entry(view: View, own: MemberInfo) -> MemberInfo | None:
    entries = (m for m in view.members if (m.server_id, m.incarnation) == (own.server_id, own.incarnation))
    return next(entries, None)


def _target(view: View, own: MemberInfo) -> bool:
    return bool((np.frombuffer(view.target, "<i2") == view.servers.index(own.server_id)).any())
