"""Moves of replicas in two steps. One rule at a time, on a clock of ours. No socket, no sleep."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tests.moering.cluster import (
    ALL,
    EXPERTS,
    LAYERS,
    Member,
    holders,
    of,
    running,
    table,
)


def test_a_move_has_two_steps_and_the_old_replica_stays_until_the_routers_know() -> None:
    c = running(3, routers=2)
    c.members["r1"].acknowledging = False
    before = {i: of(c.view, "routing", i) for i in c.view.servers}
    joiner = c.add(Member("expert-server", "e3", state="JOINING", loading=False))
    c.run(0.2)
    share = of(c.view, "target", "e3")
    assert share
    assert {i: of(c.view, "routing", i) for i in before} == before  # step 1 changes no routing
    for i, pairs in before.items():
        assert of(c.view, "target", i) >= pairs
    joiner.follow()
    c.send(joiner, joiner.report())
    c.send(joiner, joiner.lease())
    c.run(1)
    moved = [(i, pair) for i, pairs in before.items() for pair in pairs - of(c.view, "routing", i)]
    assert moved  # step 2: others no longer take these tokens
    assert of(c.view, "routing", "e3") == share
    c.run(5)
    for i, pair in moved:  # but r1 may still send them
        assert pair in of(c.view, "target", i)
        assert pair in c.members[i].held
    assert c.members["r1"].view is not None
    c.members["r1"].acknowledged = (c.members["r1"].view.term, c.members["r1"].view.epoch)
    c.run(1.5)
    for i, pair in moved:
        assert pair not in of(c.view, "target", i)
        assert pair not in c.members[i].held


def test_a_router_that_died_holds_up_no_move() -> None:
    c = running(3, routers=2)
    c.members["r1"].acknowledging = False
    c.add(Member("expert-server", "e3", state="JOINING"))
    c.run(2)
    assert sum(len(m.held) for m in c.members.values()) > 2 * len(ALL)
    c.kill("r1")
    c.run(1)
    assert sum(len(m.held) for m in c.members.values()) == 2 * len(ALL)


def test_a_draining_server_is_emptied_while_it_serves() -> None:
    c = running(3)
    c.members["e0"].state = "DRAINING"
    for i in ("e1", "e2"):
        c.members[i].loading = False
    c.run(2)
    assert of(c.view, "routing", "e0") == c.members["e0"].held  # it goes on until others can
    for i in ("e1", "e2"):
        m = c.members[i]
        m.loading = True
        for reply in m.follow():
            c.send(m, reply)
    c.run(3)
    assert c.members["e0"].held == set()
    assert all(h == {"e1", "e2"} for h in holders(c.view))


def test_draining_never_takes_the_last_replica() -> None:
    c = running(2)
    c.kill("e1")
    c.members["e0"].state = "DRAINING"
    c.run(20)
    assert of(c.view, "routing", "e0") == ALL
    assert of(c.view, "target", "e0") == ALL


def test_tokens_counted_by_routers_shape_the_next_plan() -> None:
    c = running(3)
    loads = np.zeros((LAYERS, EXPERTS), "<f4")
    loads[0, :2] = 1e6  # two experts with all the tokens of layer 0
    router = c.members["r0"]
    c.send(router, replace(router.lease(), loads=loads.tobytes()))
    c.add(Member("gateway", "g1"))  # no change of plan
    c.run(1)
    first = [row[0] for row in table(c.view, "routing")[0]]
    c.add(Member("expert-server", "e3", state="JOINING"))
    c.run(3)
    first = [row[0] for row in table(c.view, "routing")[0]]
    assert first[0] != first[1]
