"""Popularity that drifts: the plan follows with few moves. On a clock of ours. No socket, no sleep."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moering.balance import max_over_mean, server_loads
from moering.drift import balance_of, moved_replicas
from moering.ring import Member as Server
from moering.ring import plan
from moering.tables import ways_of
from tests.moering.cluster import EXPERTS, LAYERS, Cluster, Member, of, running, table
from tests.moering.test_ring import imbalance, zipf


def count(c: Cluster, *hot: tuple[int, int], tokens: float = 1e6) -> None:
    """The router reports so many tokens for each of these experts, and a tenth for all others."""
    loads = np.full((LAYERS, EXPERTS), tokens / 10, "<f4")
    for layer, expert in hot:
        loads[layer, expert] = tokens
    c.send(c.members["r0"], replace(c.members["r0"].lease(), loads=loads.tobytes()))


def test_a_hot_expert_gets_a_replica_more_and_its_rows_are_shared_once_that_is_loaded() -> None:
    c = running(4, rebalance_s=5.0)
    for m in c.members.values():
        m.loading = False
    before = table(c.view, "routing")
    count(c, (0, 1))
    c.run(6)
    assert ways_of(c.view)[0, 1] >= 3  # it has 10 of 13 of the layer's tokens
    assert len(table(c.view, "target")[0][1]) >= 3
    assert {frozenset(r) for r in table(c.view, "routing")[0]} == {frozenset(r) for r in before[0]}  # not loaded yet
    for m in [m for m in c.members.values() if m.kind == "expert-server"]:
        m.loading = True
        for reply in m.follow():
            c.send(m, reply)
    c.run(3)
    assert len(table(c.view, "routing")[0][1]) >= 3
    assert any(e.type == "plan.levelled" for e in c.coordinator.timeline.after(0, 100))


def test_an_order_levels_without_a_move_and_then_nothing_more_happens() -> None:
    c = running(2, rebalance_s=5.0)
    firsts = [row[0] for row in table(c.view, "routing")[0]]
    same = [e for e in range(EXPERTS) if firsts[e] == firsts[0]][:2]
    held = {i: set(m.held) for i, m in c.members.items()}
    count(c, *[(0, e) for e in same])
    c.run(6)
    firsts = [row[0] for row in table(c.view, "routing")[0]]
    assert firsts[same[0]] != firsts[same[1]]
    assert {i: m.held for i, m in c.members.items()} == held
    epoch = c.view.epoch
    c.run(30)
    assert c.view.epoch == epoch


def test_nothing_is_levelled_by_a_few_tokens_or_when_it_is_switched_off() -> None:
    for tokens, rebalance_s in ((100.0, 5.0), (1e6, 0.0)):
        c = running(4, rebalance_s=rebalance_s)
        epoch = c.view.epoch
        count(c, (0, 1), tokens=tokens)
        c.run(20)
        assert c.view.epoch == epoch


def test_nothing_is_levelled_while_a_server_is_away() -> None:
    c = running(4, rebalance_s=5.0, rejoin_grace_s=60.0)
    c.kill("e0")
    count(c, (0, 1))
    c.run(20)
    assert not (ways_of(c.view) > 1).any()


def test_a_new_coordinator_keeps_the_hot_experts_replicas_until_it_has_counted_itself() -> None:
    c = running(4, rebalance_s=5.0)
    count(c, (0, 1))
    c.run(8)
    ways, replicas = ways_of(c.view), len(table(c.view, "routing")[0][1])
    assert replicas >= 3
    c.run(1)
    c.start_coordinator()
    c.run(8)
    assert c.view.term == 2
    assert np.array_equal(ways_of(c.view), ways)
    assert len(table(c.view, "routing")[0][1]) == replicas


def test_a_joiner_is_not_mistaken_for_drift() -> None:
    c = running(3, rebalance_s=5.0)
    c.add(Member("expert-server", "e9", state="JOINING"))
    c.run(20)
    assert of(c.view, "routing", "e9")
    assert not any(e.type == "plan.levelled" for e in c.coordinator.timeline.after(0, 100))


def test_the_loads_of_servers_are_those_of_counting() -> None:
    popularity = zipf(4, 32, 1.2)
    p = plan(None, [Server(f"s{i}", 40) for i in range(8)], popularity, 2, 4, 32)
    assert (p.ways > 1).any()
    ratios = max_over_mean(server_loads(p.replicas, p.ways, popularity, 8))
    assert np.isclose(ratios.max(), imbalance(p, popularity)[0])


def test_drift_on_64_servers_is_levelled_by_few_moves() -> None:
    layers, experts, n = 3, 256, 64
    popularity = zipf(layers, experts, 1.0)
    members = [Server(f"s{i}", 2 * layers * experts * 5 // 4 // n) for i in range(n)]
    before = plan(None, members, popularity, 2, layers, experts)
    drifted = popularity * np.exp(np.random.default_rng(1).normal(0, 0.3, popularity.shape))
    stuck = plan(before, members, drifted, 2, layers, experts)
    after = plan(before, members, drifted, 2, layers, experts, moves=60)
    extras = int((after.replicas >= 0).sum() - (before.replicas >= 0).sum())
    assert balance_of(stuck, drifted).max() > 1.3
    assert balance_of(after, drifted).max() <= 1.15
    assert moved_replicas(before, after) <= 60 + max(extras, 0) + moved_replicas(before, stuck)
