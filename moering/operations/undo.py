"""How an operation is rolled back. Pure."""

from __future__ import annotations

from dataclasses import replace

from moering.operations.facts import Facts, end, launcher_knows, online, still_there, to_phase
from moering.protocol import Operation

MIN_ROLL_BACK_S = 60.0


def roll_back(op: Operation, reason: str, facts: Facts, now_at: float) -> Operation:
    """Begin to undo `op`: what it started is ended, what it drains stays, what it ended is started again."""
    grant_s = max(MIN_ROLL_BACK_S, op.deadline_at - op.started_at)
    undo = replace(op, error=reason, deadline_at=now_at + grant_s)
    undo = to_phase(undo, "rolling back", start={}, stop=[], retire=[], drain={}, pending={})
    if op.action == "restart":
        return _roll_back_restart(op, undo, facts)
    if op.phase == "starting":
        return _end_all(undo, list(op.start), facts)
    return replace(undo, start={server_id: op.kind for server_id in op.retire})


def _roll_back_restart(op: Operation, undo: Operation, facts: Facts) -> Operation:
    """The launcher starts again whoever exits; only a stand-in may be left to end."""
    surge = facts.member(op.surge) if op.surge else None
    if not op.surge or (surge is not None and facts.refusal([op.surge], op.floor) is not None):
        error = f"{undo.error}; {op.surge} is still needed and stays" if op.surge else undo.error
        return replace(undo, error=error, surge="")
    return _end_all(undo, [op.surge], facts)


def _end_all(undo: Operation, server_ids: list[str], facts: Facts) -> Operation:
    """Drain those that serve, stop the others, start none of them again."""
    serving = [m for m in map(facts.member, server_ids) if m is not None and m.state != "JOINING"]
    drain = {m.server_id: m.incarnation for m in serving}
    return replace(undo, retire=server_ids, drain=drain, stop=[i for i in server_ids if i not in drain])


def end_roll_back(op: Operation, facts: Facts, now_at: float, late: bool) -> Operation:
    """`op` failed, once everything is as it was, or when that takes too long."""
    undone = (
        all(online(i, facts) for i in op.start)
        and not any(still_there(i, incarnation, facts) for i, incarnation in op.drain.items())
        and all(facts.member(i) is None for i in op.stop)
        and (launcher_knows(op, facts) or not (op.start or op.stop))
    )
    if undone:
        return end(op, now_at, f"{op.error}; rolled back")
    return end(op, now_at, f"{op.error}; the roll-back did not finish either") if late else op
