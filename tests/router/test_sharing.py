"""The rows of a hot expert are spread over the replicas that share them, and of no other expert."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from router.health import DOUBTED, GONE, GOOD
from router.packing import pack
from router.sharing import ROWS_PER_PART, find_shares, pack_shared
from tests import tiny
from tests.router.mini_cluster import Client, MiniCluster
from tests.router.test_dispatch import EXPERTS, LAYERS, dispatcher, ring, sends, topk, view

HOT = 5
NOBODY_ABSENT = np.zeros((LAYERS, EXPERTS, 3), bool)


def sharing(routing, hot=HOT, ways=2):
    """Dispatcher of servers a, b, c whose plan shares one expert of each layer."""
    d = dispatcher(routing=routing)
    table = np.ones((LAYERS, EXPERTS), np.uint8)
    table[:, hot] = ways
    d.view_changed(replace(view(routing, epoch=2), ways=table.tobytes()), 0.0)
    return d


def servers_of(out, expert):
    """Each server's number of slots of an expert."""
    counts = {x.server: int((x.experts == expert).sum()) for x in out}
    return {server: n for server, n in counts.items() if n}


def test_many_rows_of_a_hot_expert_are_divided_and_each_slot_is_sent_once():
    d = sharing(ring(3), ways=3)
    ids = np.array([[HOT, e] for e in (0, 1, 2, 3) * 9])
    out = sends(d.submit(1, 0, ids, None, True, 0.0))
    assert servers_of(out, HOT) == {"a": 12, "b": 12, "c": 12}
    assert servers_of(out, 1) == {"b": 9}  # others go to the first of their list
    assert sorted(np.concatenate([x.slots for x in out]).tolist()) == list(range(ids.size))
    for x in out:
        assert (x.experts == ids.reshape(-1)[x.slots]).all()
        assert (x.rows[x.local_rows()] == x.slots // 2).all()
        assert x.distinct_experts == len(set(x.experts.tolist()))


def test_few_rows_go_as_a_whole_to_the_replicas_in_turn_in_every_layer():
    d = sharing(ring(2))
    ids = np.array([[HOT, 0]] * (2 * ROWS_PER_PART - 1))
    for layer in range(LAYERS):
        turns = [servers_of(sends(d.submit(9 * n + layer, layer, ids, None, False, 0.0)), HOT) for n in range(4)]
        assert [list(t) for t in turns] == [["c"], ["a"]] * 2


def test_a_view_without_ways_gives_all_to_the_first():
    d = dispatcher(routing=ring(3))
    assert servers_of(sends(d.submit(1, 0, np.array([[HOT, 0]] * 40), None, True, 0.0)), HOT) == {"c": 40}


def test_the_rows_of_a_sharer_that_dies_go_to_the_others():
    d = sharing(ring(3), ways=3)
    out = sends(d.submit(1, 0, np.array([[HOT, 1]] * 24), None, True, 0.0))
    again = sends(d.disconnected("c", 0.1))
    assert servers_of(out, HOT)["c"] == sum(servers_of(again, HOT).values()) == 8
    assert set(servers_of(again, HOT)) <= {"a", "b"}
    later = sends(d.submit(2, 0, np.array([[HOT, 1]] * 24), None, True, 0.2))
    assert servers_of(later, HOT) == {"a": 12, "b": 12}


def test_sharers_are_the_first_replicas_of_the_best_rank():
    routing, ways = ring(3).astype(np.int16), np.ones((LAYERS, EXPERTS), np.uint8)
    ways[1, HOT] = 2  # its replicas: 2, 0, 1

    def shares(ranks, absent=NOBODY_ABSENT):
        found = find_shares(routing, absent, np.array(ranks), ways)
        return {layer: {e: s.tolist() for e, s in by.items()} for layer, by in found.items()}

    assert shares([GOOD, GOOD, GOOD]) == {1: {HOT: [2, 0]}}
    assert shares([DOUBTED, GOOD, GOOD]) == {1: {HOT: [2, 1]}}
    assert shares([DOUBTED, DOUBTED, GOOD]) == {}
    assert shares([DOUBTED, DOUBTED, GONE]) == {1: {HOT: [0, 1]}}
    assert shares([GONE, GONE, GONE]) == {}
    absent = NOBODY_ABSENT.copy()
    absent[1, HOT, 0] = True  # it said that it does not have the expert
    assert shares([GOOD, GOOD, GOOD], absent) == {1: {HOT: [0, 1]}}


@pytest.mark.parametrize("rows", [3, 60])
def test_without_hot_rows_the_packets_are_those_of_pack(rows):
    ids, route = topk(rows).reshape(-1), ring()[0, :, 0]
    cold = ids != HOT
    slots = np.flatnonzero(cold)
    shared = pack_shared(slots, ids, route, 2, {HOT: np.array([0, 1], np.int16)}, turn=1)
    for a, b in zip(shared, pack(slots, ids, route, 2), strict=True):
        assert a.server == b.server
        assert all(np.array_equal(x, y) for x, y in zip(a[1:], b[1:], strict=True))


def test_a_missing_hot_expert_is_missed_like_any_other():
    routing = ring(2)
    routing[0, HOT] = -1
    d = sharing(routing)
    d.submit(1, 0, np.array([[HOT, 0]] * 3), None, False, 0.0)
    assert d.works[1].missed()[0].tolist() == [0, 2, 4]


def test_shared_rows_give_the_same_tokens_and_bits(tmp_path):
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint", layers=2)
    prompts = {f"q{i}": list(range(5 + i, 45 + i)) for i in range(4)}

    def answers(cluster):
        client = Client(cluster.address)
        for name, prompt in prompts.items():
            client.submit(name, prompt)
        return client.until_ended(len(prompts))

    cluster = MiniCluster(tmp_path, checkpoint, n=3, replication=3)
    alone = answers(cluster)
    c, before = cluster.checkpoint, cluster.engine.view
    assert before is not None
    shared = replace(before, epoch=2, ways=bytes([3]) * (c.num_layers * c.num_experts))
    cluster.engine.view_changed(shared)
    assert answers(cluster) == alone
    assert cluster.engine.view is shared
    turns = cluster.exchange.dispatcher.routes._turns
    assert min(turns[layer] for layer in range(c.num_layers)) > 10
    cluster.close()
