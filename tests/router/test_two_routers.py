"""Two routers share the expert servers: their rows are computed in one call, and each gets its own, bit for bit."""

from __future__ import annotations

import pytest

from expert_server import batching, service
from tests import tiny
from tests.router.mini_cluster import Client, MiniCluster

PROMPTS = {f"q{i}": [5 + i, 6, 7 + 2 * i, *range(10, 10 + 3 * i)] for i in range(8)}
MERGES = 60  # then servers take what is there, as always


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("checkpoint"), layers=3)


def answers(clients):
    """Even requests go to the first client's router, odd ones to the last one's."""
    for i, (name, prompt) in enumerate(PROMPTS.items()):
        clients[i % 2 * (len(clients) - 1)].submit(name, prompt)
    per_client = len(PROMPTS) // len(clients)
    return {name: tokens for c in clients for name, tokens in c.until_ended(per_client).items()}


def test_merged_dispatches_give_each_router_the_bits_it_has_alone(tmp_path, checkpoint, monkeypatch):
    first = MiniCluster(tmp_path, checkpoint)
    clients = [Client(first.address)]
    alone = answers(clients)
    second = MiniCluster(tmp_path, checkpoint, beside=first)
    clients = [Client(first.address), Client(second.address)]
    merged, group, receive = [], batching.group, service.Service._receive

    def watch(requests, max_pairs):
        groups = group(requests, max_pairs)
        merged.extend(g for g in groups if len({r.message.router for r in g.requests}) == 2)
        return groups

    def wait_for_both(self):
        """Look a second time for the other router's rows; the first look may take 200 ms."""
        requests = receive(self)
        if len(merged) < MERGES and len({r.message.router for r in requests}) == 1:
            requests += receive(self)
        return requests

    monkeypatch.setattr(batching, "group", watch)
    monkeypatch.setattr(service.Service, "_receive", wait_for_both)
    together = answers(clients)
    assert merged, "no call held rows of both routers"
    assert together == alone
    for cluster in (second, first):
        cluster.close()
