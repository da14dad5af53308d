"""What is read from a series of statuses, and who may be killed."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest

from bench.cluster import Process, Status, kill
from bench.episodes import Episode, Killed, choose_victims
from moering.errors import MoeringError


def process(id: str, incarnation: int = 1, state: str = "ONLINE", kind: str = "expert-server") -> Process:
    return Process(id, kind, 100 + incarnation, state, incarnation)


def status(at_s: float, survivable: int, *processes: Process, **counters: int) -> Status:
    return Status(at_s, 1, survivable, {p.id: p for p in processes}, counters)


A, B = process("a"), process("b")


def episode(*after: Status) -> Episode:
    before = status(9.9, 1, A, B, dispatches_lost=4, rows_resent=10)
    return Episode([Killed(A, 10.0)], before, after, wanted=1, streams=8)


def test_the_times_of_a_recovery() -> None:
    seen = episode(
        status(10.05, 1, A, B, dispatches_lost=4, rows_resent=10),  # nobody has noticed
        status(10.10, 1, A, B, dispatches_lost=5, rows_resent=10),
        status(10.15, 0, B, dispatches_lost=5, rows_resent=13),
        status(10.20, 0, process("a", 2, "JOINING"), B, dispatches_lost=5, rows_resent=13),
        status(11.00, 0, process("a", 2), B, dispatches_lost=5, rows_resent=13),
        status(11.50, 1, process("a", 2), B, dispatches_lost=5, rows_resent=13),
    )
    assert seen.noticed_s == pytest.approx(0.15)
    assert seen.rerouted_s == pytest.approx(0.15)
    assert seen.replaced_s == pytest.approx(1.0)
    assert seen.redundant_s == pytest.approx(1.5)
    assert seen.over and seen.hit is True
    assert seen.counted() == {"dispatches_lost": 1, "rows_resent": 3}


def test_redundancy_that_is_lost_again_is_not_restored() -> None:
    seen = episode(status(10.1, 0, B), status(10.2, 1, B), status(10.3, 0, B))
    assert seen.redundant_s is None
    later = episode(*seen.after, status(10.4, 1, process("a", 2), B))
    assert later.redundant_s == pytest.approx(0.4)
    assert later.over


def test_a_dead_process_that_still_looks_alive_is_no_recovery() -> None:
    seen = episode(status(10.1, 1, A, B), status(10.2, 1, A, B))
    assert (seen.noticed_s, seen.redundant_s, seen.replaced_s, seen.over) == (None, None, None, False)


def test_survivors_may_restore_redundancy_before_the_dead_is_replaced() -> None:
    seen = episode(status(10.1, 0, B), status(10.2, 1, B))
    assert seen.redundant_s == pytest.approx(0.2)
    assert not seen.over


def test_no_status_at_all_after_the_kill() -> None:
    seen = episode()
    assert (seen.noticed_s, seen.end_s, seen.over, seen.hit) == (None, 10.0, False, False)


def test_victims_are_online_and_of_their_kind() -> None:
    now = status(0, 1, A, B, process("c", state="JOINING"), process("r", kind="router"))
    chosen = choose_victims(now, ["expert-server", "expert-server", "router"], random.Random(0))
    assert {p.id for p in chosen[:2]} == {"a", "b"} and chosen[2].id == "r"
    with pytest.raises(MoeringError, match="expert-server"):
        choose_victims(now, ["expert-server"] * 3, random.Random(0))


def test_only_a_process_of_the_right_kind_is_killed() -> None:
    argv = [sys.executable, "-S", "-c", "import sys; print(flush=True); sys.stdin.read()", "expert_server"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()  # its command line can be read from here on
        with pytest.raises(MoeringError, match="no coordinator"):
            kill(Process("x", "coordinator", child.pid, "ONLINE", 1))
        assert child.poll() is None
        kill(Process("x", "expert-server", child.pid, "ONLINE", 1))
        assert child.wait(60) == -9
    with pytest.raises(MoeringError, match="no process"):
        kill(Process("x", "expert-server", child.pid, "ONLINE", 1))


def test_a_status_that_is_none_is_refused() -> None:
    with pytest.raises(MoeringError, match="processes"):
        Status.parse(0.0, {"epoch": 1, "failures_survivable": 1})
    entry = {"id": "a", "kind": "router", "pid": os.getpid(), "state": "ONLINE", "incarnation": 7}
    parsed = Status.parse(0.0, {"epoch": 1, "failures_survivable": 1, "processes": [entry]})
    assert parsed.processes["a"].incarnation == 7 and parsed.counters == {}
