"""How an operation goes from phase to phase. Pure: what is true of the cluster comes in as `Facts`.

::

    scale up    starting → done
    scale down  preparing → draining → done
    drain       [preparing →] draining → done                   preparing only where a launcher has to be told
    restart     (starting →) restarting … (preparing → draining) → done

Whatever goes wrong leads to "rolling back", and from there to "failed". A new coordinator goes on from the operation as
the last view shows it, so everything that the next step needs is in the operation itself.
"""

from __future__ import annotations

from dataclasses import replace

from moering.operations.facts import (
    ENDED,
    PREFIXES,
    Facts,
    end,
    free_ids,
    launcher_knows,
    name_prefix,
    online,
    still_there,
    to_phase,
)
from moering.operations.undo import end_roll_back, roll_back
from moering.protocol import Operation

MAX_DEATHS = 3
"""A new process that dies so often before it serves ends the operation."""


def step(op: Operation, facts: Facts, now_at: float) -> Operation:
    """`op` after a look at the cluster; the same object where nothing has changed."""
    if op.phase in ENDED:
        return op
    late = now_at >= op.deadline_at
    if op.phase == "rolling back":
        return end_roll_back(op, facts, now_at, late)
    if late:
        return roll_back(op, f"not finished within {op.deadline_at - op.started_at:g} s", facts, now_at)
    return _STEPS[op.phase](op, facts, now_at)


def _starting(op: Operation, facts: Facts, now_at: float) -> Operation:
    dying = [i for i in op.start if facts.deaths(i) >= MAX_DEATHS]
    if dying:
        reason = f"{dying[0]} died {facts.deaths(dying[0])} times before it served; see its lines in the log"
        return roll_back(op, reason, facts, now_at)
    if not (all(online(i, facts) for i in op.start) and facts.settled):
        return op
    return next_restart(op, facts, now_at) if op.action == "restart" else end(op, now_at)


def _preparing(op: Operation, facts: Facts, now_at: float) -> Operation:
    """Until the launcher knows whom not to start again."""
    if not launcher_knows(op, facts):
        return op
    members = [m for m in map(facts.member, op.retire) if m is not None]
    return to_phase(op, "draining", drain={m.server_id: m.incarnation for m in members})


def _draining(op: Operation, facts: Facts, now_at: float) -> Operation:
    left = [i for i, incarnation in op.drain.items() if still_there(i, incarnation, facts)]
    if left:
        reason = facts.refusal(left, op.floor)
        return op if reason is None else roll_back(op, reason, facts, now_at)
    if not facts.settled:
        return op
    if op.action == "restart":
        return next_restart(replace(op, surge=""), facts, now_at)
    return end(op, now_at)


def _restarting(op: Operation, facts: Facts, now_at: float) -> Operation:
    server_id, old = next(iter(op.pending.items()))
    # An elected coordinator is followed by another one; a single one comes back with its id.
    succeeded = server_id.endswith("coordinator") and facts.member(server_id) is None
    if still_there(server_id, old, facts):
        reason = None if server_id not in op.drain else facts.refusal([server_id], op.floor)
        return op if reason is None else roll_back(op, reason, facts, now_at)
    if not ((succeeded or online(server_id, facts)) and facts.settled):
        return op
    pending = {i: incarnation for i, incarnation in op.pending.items() if i != server_id}
    return next_restart(replace(op, pending=pending), facts, now_at)


def next_restart(op: Operation, facts: Facts, now_at: float) -> Operation:
    """Restart the next process; before that, start a stand-in where the cluster cannot do without it."""
    following = next((m for m in map(facts.member, op.pending) if m is not None), None)
    if op.surge and (following is None or not op.surge.startswith(name_prefix(following.kind, facts))):
        return to_phase(op, "preparing", start={}, drain={}, retire=[op.surge])
    if not op.pending:
        return end(op, now_at)
    server_id, incarnation = next(iter(op.pending.items()))
    member = facts.member(server_id)
    if member is not None and member.incarnation == incarnation and member.kind in PREFIXES:
        reason = facts.refusal([server_id], op.floor)
        if reason is not None and op.surge:
            return roll_back(op, reason, facts, now_at)
        if reason is not None:
            start = free_ids(member.kind, 1, facts)
            return to_phase(op, "starting", start=start, drain={}, surge=next(iter(start)))
    return to_phase(op, "restarting", start={}, drain={server_id: incarnation})


_STEPS = {"starting": _starting, "preparing": _preparing, "draining": _draining, "restarting": _restarting}
