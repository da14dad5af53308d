"""Whether an operation may begin, and with which phase. Pure."""

from __future__ import annotations

from dataclasses import replace

from moering.operations.facts import PREFIXES, Facts, end, free_ids, natural, to_phase
from moering.operations.steps import next_restart
from moering.protocol import Operate, Operation

SCALABLE = ("expert-server", "router")
RESTART_ORDER = ("expert-server", "router", "gateway", "coordinator")
DEADLINE_S = 300.0
"""For a scaling, a drain, and the restart of each process, where the request gives none."""
MAX_DEADLINE_S = 86_400.0
MAX_STARTED = 64


class Refusal(Exception):
    """An operation that is not begun. `code` as in `OperateAnswer`."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def begin(ask: Operate, facts: Facts, now_at: float) -> Operation:
    """The operation that `ask` wants. Raises `Refusal`."""
    if not 1 <= len(ask.id) <= 100 or not 0 <= ask.deadline_s <= MAX_DEADLINE_S:
        raise Refusal("bad_request", f"an id has 1 to 100 characters, and a deadline is at most {MAX_DEADLINE_S:g} s")
    deadline_at = now_at + (ask.deadline_s or DEADLINE_S)
    op = Operation(ask.id, ask.action, ask.process_kind, ask.count, "", "", now_at, deadline_at)
    op = replace(op, floor=facts.floor())
    if ask.action == "scale":
        return _begin_scale(op, facts)
    if ask.action == "drain":
        return _begin_drain(op, ask.target, facts)
    if ask.action == "restart":
        return _begin_restart(op, ask, facts)
    raise Refusal("bad_request", f"there is no operation {ask.action!r:.40}")


def _begin_scale(op: Operation, facts: Facts) -> Operation:
    if op.kind not in SCALABLE:
        raise Refusal("bad_request", f"kind {op.kind!r:.40} is not one of {', '.join(SCALABLE)}")
    here = sorted((m.server_id for m in facts.of_kind(op.kind)), key=natural)
    if not 1 <= op.count <= len(here) + MAX_STARTED:
        raise Refusal("bad_request", f"count {op.count} is not in 1..{len(here) + MAX_STARTED}")
    if facts.launcher is None:
        raise Refusal(
            "refused",
            "no launcher is a member of this cluster: processes are started and counted by its orchestrator "
            "(Kubernetes, compose, systemd); start more there, or drain one (`moering drain ID`) and remove it there",
        )
    surplus = here[op.count :]
    if surplus:
        _check(op, surplus, facts)
        return to_phase(op, "preparing", retire=surplus)
    if op.count == len(here):
        return end(op, op.started_at)
    return to_phase(op, "starting", start=free_ids(op.kind, op.count - len(here), facts))


def _begin_drain(op: Operation, target: str, facts: Facts) -> Operation:
    member = facts.member(target)
    if member is None:
        raise Refusal("not_found", f"there is no process {target!r:.80}")
    if member.kind not in PREFIXES:
        raise Refusal("bad_request", f"a {member.kind} holds nothing that could be drained")
    op = replace(op, kind=member.kind)
    _check(op, [target], facts)
    if facts.launcher is not None:
        return to_phase(op, "preparing", retire=[target])
    return to_phase(op, "draining", drain={target: member.incarnation})


def _begin_restart(op: Operation, ask: Operate, facts: Facts) -> Operation:
    if facts.launcher is None:
        raise Refusal(
            "refused",
            "no launcher is a member of this cluster: drain one process after the other (`moering drain ID`), and let "
            "the orchestrator start each again",
        )
    if op.kind not in ("", *RESTART_ORDER):
        raise Refusal("bad_request", f"kind {op.kind!r:.40} is not one of {', '.join(RESTART_ORDER)}")
    kinds = [k for k in RESTART_ORDER if op.kind in ("", k)]
    members = [m for k in kinds for m in sorted(facts.of_kind(k), key=lambda m: natural(m.server_id))]
    if ask.target:
        members = [m for m in members if m.server_id == ask.target]
    if not members:
        raise Refusal("not_found", f"there is no process {ask.target or op.kind!r:.80} that could be restarted")
    total_s = ask.deadline_s or DEADLINE_S * len(members)
    op = replace(op, deadline_at=op.started_at + total_s, pending={m.server_id: m.incarnation for m in members})
    return next_restart(op, facts, op.started_at)


def _check(op: Operation, server_ids: list[str], facts: Facts) -> None:
    reason = facts.refusal(server_ids, op.floor)
    if reason is not None:
        raise Refusal("refused", reason)
