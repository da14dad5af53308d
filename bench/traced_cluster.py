"""`moering serve` whose processes write down what they do: ``python -m bench.traced_cluster TRACE MODEL``, then flags.

Every call of a function in `POINTS` becomes a line of JSON at the end of the file TRACE: `at` and `took`, in ns of the
machine's monotonic clock, `process`, `code` (file:function), and facts. A line is written by one system call, so all
processes may write to one file, and what a process did before a SIGKILL is there.

The first expert server that has a decode row in hand once there is a file TRACE.kill deletes it and SIGKILLs itself:
its death leaves rows unanswered, which a signal from outside would meet by chance only.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moering import process
from moering.expert_frames import ITEM_BYTES, Reply

Facts = Mapping[str, Any] | None

TRACE = "BENCH_CLUSTER_TRACE"
"""The environment variable that names the file."""
KILLED = "SIGKILL"


class Point(NamedTuple):
    """A method whose calls are recorded. `facts` gets its arguments before the call, or, with `result`, what it
    returned and its arguments afterwards. A call whose facts are None is left out."""

    module: str
    name: str
    facts: Callable[..., Facts]
    result: bool = False

    @property
    def code(self) -> str:
        """Where it is: file:function."""
        return f"{self.module.replace('.', '/')}.py:{self.name}"


def _again(sends: list[Any], dispatcher: Any, d: Any, slots: Any, *args: Any, **kwargs: Any) -> Facts:
    top_k = dispatcher.works[d.work].top_k
    sent = [(s.dispatch.seq, s.dispatch.server, s.dispatch.rows.tolist()) for s in sends]
    return {"seq": d.seq, "server": d.server, "rows_lost": sorted({int(s) // top_k for s in slots}), "sent": sent}


def _dispatches(service: Any, group: Any) -> Facts:
    messages = [r.message for r in group.requests]
    size = sum(m.rows * m.columns * ITEM_BYTES[m.dtype] for m in messages)
    seqs = [m.seq for m in messages]
    return {
        "seqs": seqs,
        "layer": messages[0].layer,
        "pairs": sum(group.counts),
        "experts": group.experts,
        "bytes_in": size,
    }


def _reply(service: Any, identity: bytes, message: Any, tensor: Any = None) -> Facts:
    if not isinstance(message, Reply):
        return None
    size = message.rows * message.columns * ITEM_BYTES[message.dtype]
    return {"seq": message.seq, "pairs": message.rows, "compute_us": message.compute_us, "bytes_out": size}


def _view(actions: list[Any], membership: Any, now_s: float) -> Facts:
    view = membership.view
    return {"epoch": view.epoch, "under_target": view.under_target, "replication": view.replication,
            "survivable": view.failures_survivable} if actions else None  # fmt: skip


POINTS = {
    "gateway": [
        Point("gateway.generation", "Generation.start", lambda g: {
            "request": g.outputs[0].record.request_id, "prompt": len(g.prompts[0]),
            "max_tokens": g.outputs[0].record.sampling.max_tokens}),
        Point("gateway.router_pool", "RouterPool._route", lambda link, pool, record: link and {
            "server": link.member.server_id}, result=True),
        Point("gateway.journal", "Journal.take", lambda journal, t: {"position": t.position, "token": t.token_id}),
    ],
    "router": [
        Point("router.engine", "Engine._submit", lambda engine, gateway, s: {
            "attempt": s.attempt, "prompt": len(s.prompt)}),
        Point("router.scheduler", "Scheduler.schedule", lambda batch, scheduler: batch and {
            "decode": batch.decode_rows, "prefill": batch.prefill_tokens}, result=True),
        Point("router.flight", "Flight.launch", lambda f: {"layer": f.layer, "rows": f.rows}),
        Point("router.exchange", "Exchange.submit", lambda exchange, f, *rest: {
            "layer": f.layer, "rows": f.rows, "pairs": f.topk_ids.size, "first": f.topk_ids[0].tolist()}),
        Point("router.connection", "Connection.send", lambda connection, d, rows: {
            "seq": d.seq, "server": d.server, "layer": d.layer, "rows": len(d.rows), "pairs": len(d.slots),
            "experts": sorted(set(d.experts.tolist())), "role": d.role.value}),
        Point("router.exchange", "Exchange._put", lambda exchange, connection, reply, tensor: {
            "seq": reply.seq, "pairs": reply.rows, "server": connection.server_id}),
        Point("router.flight", "Flight.after_experts", lambda f: {"layer": f.layer}),
        Point("router.engine", "Engine._emit", lambda engine, sequence, sampled: sampled and {
            "position": len(sequence.output), "token": sampled.token_id}),
        Point("router.exchange", "Exchange._lose", lambda exchange, connection, why, *rest: {
            "server": connection.server_id, "why": why,
            "seqs": [d.seq for d in exchange.dispatcher.outstanding_at(connection.server_id)]}),
        Point("router.dispatch", "Dispatcher._again", _again, result=True),
        Point("router.engine", "Engine._follow_view", lambda engine: engine._new_view and {
            "epoch": engine._new_view.epoch}),
        Point("router.exchange", "Exchange._welcome", lambda exchange, connection, welcome: {
            "server": connection.server_id, "incarnation": welcome.incarnation}),
    ],
    "expert-server": [
        Point("expert_server.service", "Service._answer", _dispatches),
        Point("expert_server.service", "Service._send", _reply),
        Point("expert_server.loader", "Loader._load_all", lambda done, loader, missing, *rest: {
            "experts": len(missing)} if missing else None, result=True),
    ],
    "coordinator": [
        Point("moering.membership", "Membership._register", lambda m, sender, register, now_s: {
            "server": register.member.server_id, "pid": register.member.pid,
            "incarnation": register.member.incarnation}),
        Point("moering.membership", "Membership._proven_exit", lambda m, sender, proof, now_s: {
            "server": proof.server_id, "pid": proof.pid, "exit_code": proof.exit_code}),
        Point("moering.membership", "Membership._bury", lambda m, record, reason, **rest: {
            "server": record.info.server_id, "incarnation": record.info.incarnation, "reason": reason}),
        Point("moering.membership", "Membership._state_changed", lambda m, record, was, now_s: {
            "server": record.info.server_id, "state": record.info.state, "was": was}),
        Point("moering.membership", "Membership._publish", _view, result=True),
    ],
    "launcher": [
        Point("moering.exit_reports", "ExitReports.send", lambda reports, exit: {
            "server": exit.server_id, "pid": exit.pid, "exit_code": exit.exit_code}),
        Point("moering.supervisor", "Supervisor._spawn", lambda supervisor, child, output: {
            "server": child.command.id}),
    ],
}  # fmt: skip
"""By kind of process."""


def write(trace: str, name: str, began_ns: int, **facts: Any) -> None:
    """Add a line to the trace."""
    event = {"at": began_ns, "took": time.monotonic_ns() - began_ns, "process": name, **facts}
    with open(trace, "ab", buffering=0) as file:
        file.write(json.dumps(event).encode() + b"\n")


def install(kind: str, name: str, trace: str) -> None:
    """Record what the process `name` does from now on. Raises `AttributeError` for a point that is not there."""
    if kind == "expert-server":
        _install_kill(name, trace)
    for point in POINTS[kind]:
        class_name, method = point.name.split(".")
        owner = getattr(importlib.import_module(point.module), class_name)
        setattr(owner, method, _recorded(point, getattr(owner, method), name, trace))


def _recorded(point: Point, original: Callable[..., Any], name: str, trace: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        began_ns = time.monotonic_ns()
        facts = None if point.result else point.facts(*args, **kwargs)
        result = original(*args, **kwargs)
        if point.result:
            facts = point.facts(result, *args, **kwargs)
        if facts is not None:
            write(trace, name, began_ns, code=point.code, **facts)
        return result

    return call


def _install_kill(name: str, trace: str) -> None:
    from expert_server.batching import Group
    from expert_server.service import Service

    answer = Service._answer

    def answer_or_die(self: Service, group: Group) -> None:
        if not any(r.message.prefill for r in group.requests) and _told_to_die(trace):
            write(trace, name, time.monotonic_ns(), code=KILLED, pid=os.getpid(), **(_dispatches(self, group) or {}))
            os.kill(os.getpid(), signal.SIGKILL)
        answer(self, group)

    Service._answer = answer_or_die  # type: ignore[method-assign]


def _told_to_die(trace: str) -> bool:
    try:
        os.unlink(f"{trace}.kill")
    except FileNotFoundError:
        return False
    return True


def _serve(trace: str) -> int:
    """The launcher: all that it starts comes back to this module."""
    root = str(Path(__file__).resolve().parents[1])
    os.environ.update({TRACE: trace, "PYTHONPATH": root})
    process.MODULES.update(dict.fromkeys(process.MODULES, "bench.traced_cluster"))
    install("launcher", "launcher", trace)
    from moering import launcher

    return launcher.main(sys.argv[2:])


def _run_process(trace: str) -> None:
    """What the launcher started, known by its id: `expert-0` is an expert server. A single coordinator has none."""
    process.share_cores()  # before anything that is recorded imports PyTorch
    name = sys.argv[sys.argv.index("--id") + 1] if "--id" in sys.argv else "coordinator"
    kind = next(kind for kind in process.MODULES if kind.startswith(name.split("-")[0]))
    install(kind, name, trace)
    runpy.run_module(process.MODULES[kind], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    if TRACE in os.environ:
        _run_process(os.environ[TRACE])
    else:
        sys.exit(_serve(sys.argv[1]))
