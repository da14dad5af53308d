"""Scaling, draining and restarting, with every kind of bad luck on the way. On a clock of ours; no socket, no sleep."""

from __future__ import annotations

import pytest

from moering.protocol import Operation
from tests.moering.cluster import EXPERTS, LAYERS, holders, of
from tests.moering.elastic_cluster import BYTES, Process, elastic

SIX = [f"expert-{i}" for i in range(6)]
REPLICAS = 2 * LAYERS * EXPERTS


def ended(op: Operation, phase: str) -> None:
    assert op.phase == phase, op
    assert not (op.start or op.stop or op.retire or op.drain or op.pending)
    assert op.ended_at > op.started_at


def test_scale_up_and_down_again() -> None:
    c = elastic()
    assert c.ask("scale", kind="expert-server", count=6).code == "accepted"
    up = c.until_over()
    ended(up, "done")
    assert c.alive("expert-server") == SIX
    assert all(of(c.view, "routing", i) for i in SIX)
    new = sum(len(c.members[i].held) for i in SIX[3:])
    assert up.moved_bytes == new * BYTES

    lost_at = c.published[-1].epoch
    assert c.ask("scale", "down", kind="expert-server", count=3).code == "accepted"
    down = c.until_over()
    ended(down, "done")
    assert c.alive("expert-server") == SIX[:3]
    assert down.moved_bytes == new * BYTES  # what the leavers held, and nothing else
    assert all(v.failures_survivable == 1 for v in c.published if v.epoch > lost_at)
    c.run(30)
    assert c.alive("expert-server") == SIX[:3]  # nobody starts them again


def test_a_scaling_to_what_there_is_is_over_at_once() -> None:
    c = elastic()
    assert c.ask("scale", kind="expert-server", count=3).code == "accepted"
    assert c.until_over().moved_bytes == 0


def test_recovery_works_after_scaling() -> None:
    c = elastic()
    for id, count in (("up", 6), ("down", 3)):
        c.ask("scale", id, kind="expert-server", count=count)
        c.until_over()
    c.exit("expert-1", orderly=False)
    c.run(20)
    assert c.alive("expert-server") == SIX[:3]
    assert all(len(h) == 2 for h in holders(c.view))


def test_routers_scale_too() -> None:
    c = elastic()
    c.ask("scale", kind="router", count=3)
    ended(c.until_over(), "done")
    assert c.alive("router") == ["router-0", "router-1", "router-2"]
    c.ask("scale", "down", kind="router", count=1)
    ended(c.until_over(), "done")
    assert c.alive("router") == ["router-0"]


def test_a_drained_server_leaves_when_its_experts_are_elsewhere_and_every_router_knows() -> None:
    c = elastic(4, routers=2, launcher=False)
    share = c.members["expert-2"].held
    assert c.ask("drain", target="expert-2").code == "accepted"
    c.members["router-1"].acknowledging = False
    c.run(30)
    assert c.operation.phase == "draining"
    assert c.members["expert-2"].held == share  # router-1 may still send it rows
    c.members["router-1"].acknowledging = True
    c.members["router-1"].view = None
    ended(c.until_over(), "done")
    assert "expert-2" not in c.members
    assert all(len(h) == 2 and "expert-2" not in h for h in holders(c.view))


@pytest.mark.parametrize(
    ("ask", "code", "text"),
    [
        ({"action": "drain", "target": "expert-9"}, "not_found", "no process 'expert-9'"),
        ({"action": "drain", "target": "coordinator"}, "bad_request", "a coordinator holds nothing"),
        ({"action": "drain", "target": "router-0"}, "refused", "no other router is ONLINE"),
        ({"action": "drain", "target": "gateway-0"}, "refused", "no other gateway is ONLINE"),
        ({"action": "drain", "target": "expert-0"}, "refused", "would survive 0 failures, not the 1 promised"),
        ({"action": "scale", "kind": "expert-server", "count": 1}, "refused", "not the 1 promised"),
        ({"action": "scale", "kind": "expert-server", "count": 0}, "bad_request", "count 0"),
        ({"action": "scale", "kind": "gateway", "count": 2}, "bad_request", "kind 'gateway'"),
        ({"action": "restart", "kind": "launcher"}, "bad_request", "kind 'launcher'"),
        ({"action": "explode"}, "bad_request", "no operation 'explode'"),
        ({"action": "cancel"}, "not_found", "no operation 'op'"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(ask: dict, code: str, text: str) -> None:
    c = elastic(2)
    answer = c.ask(**ask)
    assert answer.code == code
    assert text in answer.reason
    c.run(5)
    assert not c.view.operations
    assert c.states() == dict.fromkeys(c.states(), "ONLINE")


def test_a_drain_that_leaves_too_little_memory_is_refused() -> None:
    c = elastic(3, capacity=REPLICAS // 3 + 1)
    answer = c.ask("drain", target="expert-0")
    assert answer.code == "refused" and "would survive 0 failures" in answer.reason


def test_a_second_operation_is_refused_while_one_is_under_way() -> None:
    c = elastic()
    c.ask("scale", "one", kind="expert-server", count=6)
    answer = c.ask("drain", "two", target="expert-0")
    assert answer.code == "busy" and "operation one (scale)" in answer.reason
    assert c.ask("scale", "one", kind="expert-server", count=6).code == "accepted"  # the answer had been lost
    ended(c.until_over(), "done")
    assert c.ask("drain", "two", target="expert-5").code == "accepted"


@pytest.mark.parametrize("action", ["scale", "restart"])
def test_without_a_launcher_the_orchestrator_is_named(action: str) -> None:
    c = elastic(launcher=False)
    answer = c.ask(action, kind="expert-server", count=4)
    assert answer.code == "refused" and "orchestrator" in answer.reason


@pytest.mark.parametrize("kind", ["expert-server", "router", "gateway", "coordinator", ""])
def test_a_rolling_restart_replaces_every_process_and_keeps_their_number(kind: str) -> None:
    c = elastic(2, routers=1)
    kinds = [kind] if kind else ["expert-server", "router", "gateway", "coordinator"]

    def incarnations() -> dict[str, int]:
        return {m.server_id: m.incarnation for m in c.view.members if m.kind in kinds and m.state == "ONLINE"}

    before, first = incarnations(), len(c.published)
    assert c.ask("restart", kind=kind).code == "accepted"
    ended(c.until_over(300), "done")
    after = incarnations()
    assert after.keys() == before.keys()
    assert all(after[i] != before[i] for i in before)
    # Two expert servers, two replicas: a third one stands in, so that no moment is without redundancy.
    assert all(v.failures_survivable >= 1 for v in c.published[first:] if v.layers)
    for view in c.published[first:]:
        states = [(m.kind, m.state) for m in view.members]
        assert ("router", "ONLINE") in states and ("gateway", "ONLINE") in states


def test_one_process_is_restarted() -> None:
    c = elastic()
    before = {i: m.incarnation for i, m in c.members.items()}
    c.ask("restart", target="expert-1")
    ended(c.until_over(), "done")
    assert {i for i, m in c.members.items() if m.incarnation != before[i]} == {"expert-1"}


# --- bad luck ---


def test_a_new_process_that_keeps_dying_ends_the_scaling_and_leaves_nothing_behind() -> None:
    c = elastic()
    c.broken = {"expert-4"}
    c.ask("scale", kind="expert-server", count=5)
    op = c.until_over()
    ended(op, "failed")
    assert "expert-4 died 3 times before it served" in op.error and op.error.endswith("rolled back")
    assert c.alive("expert-server") == SIX[:3]
    c.run(20)
    assert c.alive("expert-server") == SIX[:3]
    assert c.view.failures_survivable == 1


def test_a_scaling_that_takes_too_long_is_rolled_back() -> None:
    c = elastic()
    c.slow = {"expert-4"}
    c.ask("scale", kind="expert-server", count=5, deadline_s=20.0)
    op = c.until_over()
    ended(op, "failed")
    assert op.error == "not finished within 20 s; rolled back"
    assert c.alive("expert-server") == SIX[:3]


def test_a_drain_that_takes_too_long_is_taken_back() -> None:
    c = elastic(4)
    c.ask("drain", target="expert-3", deadline_s=20.0)
    for i in SIX[:3]:
        c.members[i].loading = False
    c.run(19)
    assert c.states()["expert-3"] == "DRAINING"
    op = c.until_over()
    ended(op, "failed")
    assert c.states()["expert-3"] == "ONLINE"
    assert op.error == "not finished within 20 s; rolled back"


def test_a_cancelled_drain_is_taken_back() -> None:
    c = elastic(4)
    c.ask("drain", target="expert-3")
    c.members["expert-0"].loading = c.members["expert-1"].loading = c.members["expert-2"].loading = False
    c.run(3)
    assert c.ask("cancel").code == "accepted"
    ended(c.until_over(), "failed")
    assert c.operation.error == "cancelled; rolled back"
    assert c.states()["expert-3"] == "ONLINE"
    assert c.ask("cancel").code == "refused"


def test_a_server_that_dies_while_it_drains_is_gone_and_its_experts_are_loaded_again() -> None:
    c = elastic(4)
    c.ask("drain", target="expert-3")
    c.members["expert-0"].loading = False
    c.run(2)
    assert c.states()["expert-3"] == "DRAINING"
    c.exit("expert-3", orderly=False)
    c.run(1)
    assert c.operation.phase == "draining"  # not before the redundancy is back
    c.members["expert-0"].loading = True
    c.members["expert-0"].view = None
    ended(c.until_over(), "done")
    c.run(20)
    assert c.alive("expert-server") == SIX[:3]
    assert c.view.failures_survivable == 1


def test_another_server_that_dies_for_good_stops_a_drain() -> None:
    c = elastic(3, launcher=False)
    c.ask("drain", target="expert-2")
    c.members["expert-0"].loading = False
    c.run(2)
    c.kill("expert-1")
    op = c.until_over()
    ended(op, "failed")
    assert "would survive 0 failures, not the 1 promised" in op.error
    assert c.states()["expert-2"] == "ONLINE"
    c.members["expert-0"].loading = True
    c.members["expert-0"].view = None
    c.run(10)
    assert all(len(h) == 2 for h in holders(c.view))


def test_a_restart_goes_on_after_the_process_died_while_it_drained() -> None:
    c = elastic()
    c.members["expert-1"].loading = False
    c.ask("restart", kind="expert-server")
    c.run(2)
    assert c.states()["expert-0"] == "DRAINING"
    c.members["expert-1"].loading = True
    c.exit("expert-0", orderly=False)
    ended(c.until_over(), "done")
    assert c.alive("expert-server") == SIX[:3]


def test_a_restart_whose_process_does_not_react_fails_and_its_stand_in_goes() -> None:
    c = elastic(2)
    router = c.members["router-0"]
    assert isinstance(router, Process)
    router.stuck = True
    c.ask("restart", kind="router", deadline_s=30.0)
    op = c.until_over()
    ended(op, "failed")
    assert op.error == "not finished within 30 s; rolled back"
    assert c.alive("router") == ["router-0"]


def test_a_stand_in_that_is_needed_stays() -> None:
    c = elastic(2)
    c.ask("restart", kind="router", deadline_s=30.0)
    c.run(3)
    c.broken = {"router-0"}
    op = c.until_over()
    ended(op, "failed")
    assert "router-1 is still needed and stays" in op.error
    assert c.alive("router") == ["router-1"]


# --- the coordinator dies ---


@pytest.mark.parametrize("after_s", [0.1, 0.4, 1.0, 2.5, 5.0])
@pytest.mark.parametrize("count", [6, 3])
def test_a_new_coordinator_goes_on_with_a_scaling(after_s: float, count: int) -> None:
    c = elastic(3 if count == 6 else 6)
    c.ask("scale", kind="expert-server", count=count)
    c.run(after_s)
    deadline_at = c.operation.deadline_at
    c.start_coordinator()
    op = c.until_over()
    ended(op, "done")
    assert op.deadline_at == deadline_at
    assert c.alive("expert-server") == SIX[:count]
    c.run(20)
    assert c.alive("expert-server") == SIX[:count]


def test_an_operation_that_no_member_has_seen_is_gone() -> None:
    c = elastic()
    c.ask("scale", kind="expert-server", count=6)  # answered, and the coordinator dies before it publishes
    c.start_coordinator()
    c.run(20)
    assert not c.view.operations
    assert c.alive("expert-server") == SIX[:3]


def test_a_new_coordinator_keeps_the_deadline() -> None:
    c = elastic()
    c.slow = {"expert-3"}
    c.ask("scale", kind="expert-server", count=4, deadline_s=20.0)
    c.run(2.5)
    for _ in range(3):
        c.start_coordinator()
        c.run(4)
    op = c.until_over()
    ended(op, "failed")
    assert op.ended_at < op.started_at + 30
    assert c.alive("expert-server") == SIX[:3]


def test_the_newest_view_that_a_member_brings_says_how_far_the_operation_was() -> None:
    c = elastic()
    old = c.members["gateway-0"]
    old.silent = True  # its view is from before the operation
    c.ask("scale", kind="expert-server", count=5)
    c.run(0.5)
    c.start_coordinator()
    old.silent, old.registered = False, False
    c.renew(old)
    ended(c.until_over(), "done")
    assert c.alive("expert-server") == SIX[:5]
