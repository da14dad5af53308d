"""Experts without a live replica: what each request asked for happens to its rows, whatever they are batched with."""

import threading

import pytest
import torch

from moering.checkpoint import Checkpoint
from router.attention_plan import SequenceChunk
from router.exchange import Exchange
from router.kv_cache import BLOCK_SIZE
from router.missing import leave_out
from tests import tiny
from tests.local_experts import LocalExperts
from tests.router.decoding import Model, random_tokens
from tests.router.mini_cluster import MiniCluster, wait_for

# a compute thread that "dies" ends with SystemExit
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

PROMPTS = {f"q{i}": [5 + i, 6, 7 + 2 * i, 8, *list(range(10, 10 + 3 * i))] for i in range(6)}
STEPS = 16
ONE_OF_EIGHT = {"n": 8, "replication": 1}  # each server holds one expert of each layer, alone


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("checkpoint"), layers=3)


@pytest.fixture
def cluster(tmp_path, checkpoint, request):
    c = MiniCluster(tmp_path, checkpoint, **getattr(request, "param", ONE_OF_EIGHT))
    yield c
    c.close()


class LessExperts(LocalExperts):
    """In process, without some experts: what a renormalised row has to be."""

    def __init__(self, checkpoint, missing):
        super().__init__(checkpoint)
        self._missing = torch.tensor(missing)  # the missing expert of each layer, -1 for none
        self.touched = []  # of each call, the rows that needed it

    def run(self, mb):
        super().run(mb)
        gone = mb.topk_ids == self._missing[mb.layer]
        self.touched.append(gone.any(1))
        slots = gone.flatten().nonzero().flatten()
        leave_out(mb.topk_weights, slots)
        mb.expert_rows().clear(slots.numpy())


def model_without(checkpoint, missing):
    model = Model.open(checkpoint)
    return Model(model.decoder, LessExperts(Checkpoint(checkpoint), missing))


def greedy(checkpoint, prompt, missing):
    return model_without(checkpoint, missing).greedy(prompt, STEPS, [0])


def positions_without(checkpoint, prompt, tokens, missing):
    """How many positions of prompt and answer, but the last, needed a missing expert in some layer."""
    model, sequence = model_without(checkpoint, missing), [*prompt, *tokens[:-1]]
    model.forward([(sequence, SequenceChunk([0], 0, len(sequence)))])
    return int(torch.stack(model.experts.touched).any(0).sum())


def ids(client, name):
    return [t for t, _ in client.tokens[name]]


def test_renormalized_rows_are_what_the_other_experts_give(cluster, client, checkpoint):
    gone = [(0 - layer) % 8 for layer in range(3)]  # what the first server holds
    cluster.servers[0].die()
    wait_for(lambda: "e0" in cluster.exchange.suspects)
    for name, prompt in PROMPTS.items():
        client.submit(name, prompt, on_missing_expert="renormalize")
    for first in range(5, 25):  # in the same batches, which are split at the layer where one of these has to wait
        client.submit(f"waits {first}", [first])
    client.until(lambda: set(PROMPTS) <= client.finished)
    assert client.failures == {}
    for name, prompt in PROMPTS.items():
        assert ids(client, name) == greedy(checkpoint, prompt, gone)
        assert client.renormalized[name] == positions_without(checkpoint, prompt, ids(client, name), gone)
    assert sum(client.renormalized.values()) == cluster.engine.counters()["tokens_renormalized"] > 0


def test_each_request_of_a_batch_has_its_own_policy(cluster, client, checkpoint):
    whole = {name: greedy(checkpoint, prompt, [-1] * 3) for name, prompt in PROMPTS.items()}
    for name, prompt in PROMPTS.items():
        client.submit(f"wait {name}", prompt)
        client.submit(f"go on {name}", prompt, on_missing_expert="renormalize")
        client.submit(f"fail {name}", prompt, on_missing_expert="fail", max_tokens=2000)
    client.until(lambda: len(client.tokens) == 3 * len(PROMPTS))
    cluster.servers[0].die()
    # All that go on end, all that are to fail have failed, and none that waits is done meanwhile.
    client.until(lambda: {f"go on {name}" for name in PROMPTS} <= client.finished)
    client.until(lambda: {f"fail {name}" for name in PROMPTS} == set(client.failures))
    assert set(client.failures.values()) == {"no_replica"}
    assert cluster.engine.counters()["requests_without_replica"] == len(PROMPTS)
    wait_for(lambda: cluster.engine.gauges()["requests_parked"] > 0)
    cluster.restart(0)
    client.until_ended(3 * len(PROMPTS))
    assert {name: ids(client, f"wait {name}") for name in PROMPTS} == whole
    assert all(client.renormalized[f"wait {name}"] == 0 for name in PROMPTS)
    renormalized = {name: client.renormalized[f"go on {name}"] for name in PROMPTS}
    assert any(renormalized.values())
    for name, prompt in PROMPTS.items():  # with the expert back such a request is exact again, and says so
        client.submit(f"again {name}", prompt, on_missing_expert="renormalize")
    client.until_ended(4 * len(PROMPTS))
    assert {name: ids(client, f"again {name}") for name in PROMPTS} == whole
    assert all(client.renormalized[f"again {name}"] == 0 for name in PROMPTS)
    assert cluster.engine.counters()["tokens_renormalized"] == sum(renormalized.values())
    cluster.engine._scheduler.check_integrity()


@pytest.mark.parametrize("cluster", [{"n": 2, "replication": 1}], indirect=True)
def test_with_all_experts_of_a_row_gone_it_fails(cluster, client, checkpoint):
    cluster.servers[0].die()
    wait_for(lambda: "e0" in cluster.exchange.suspects)
    for name, prompt in PROMPTS.items():
        client.submit(name, prompt, on_missing_expert="renormalize")
    client.until_ended(len(PROMPTS))
    assert set(client.failures.values()) == {"no_replica"}
    assert len(client.failures) == len(PROMPTS), "half of all experts are gone: each of these needs a pair of them"
    wait_for(lambda: cluster.engine.queued == 0)
    cluster.engine._scheduler.check_integrity()


@pytest.mark.parametrize("cluster", [ONE_OF_EIGHT | {"missing_expert_timeout_s": 0.5}], indirect=True)
def test_plans_that_change_do_not_prolong_the_wait(cluster, client):
    cluster.servers[0].die()
    for name, prompt in PROMPTS.items():
        client.submit(name, prompt)
    ended, pause = threading.Event(), threading.Event()

    def change():
        while not ended.is_set():
            cluster.publish()
            pause.wait(0.05)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        client.until(lambda: client.failures)
    finally:
        ended.set()
        thread.join()
    assert set(client.failures.values()) == {"no_replica"}


def test_a_router_that_has_not_met_all_servers_yet_decides_nothing(cluster, client, checkpoint, monkeypatch):
    settling = threading.Event()
    settling.set()
    monkeypatch.setattr(Exchange, "settling", property(lambda _: settling.is_set()))
    cluster.servers[0].die()
    for name, prompt in PROMPTS.items():
        client.submit(f"go on {name}", prompt, on_missing_expert="renormalize")
        client.submit(f"fail {name}", prompt, on_missing_expert="fail")
    wait_for(lambda: cluster.engine.gauges()["requests_parked"] == 2 * len(PROMPTS))
    settling.clear()
    client.until_ended(2 * len(PROMPTS))
    assert set(client.failures) == {f"fail {name}" for name in PROMPTS}
    for name, prompt in PROMPTS.items():
        assert ids(client, f"go on {name}") == greedy(checkpoint, prompt, [(0 - layer) % 8 for layer in range(3)])


def test_what_was_renormalized_is_no_prefix_for_others(cluster, client, checkpoint):
    prompt = random_tokens(BLOCK_SIZE + 8, seed=5)
    cluster.servers[0].die()
    wait_for(lambda: "e0" in cluster.exchange.suspects)
    client.submit("first", prompt, on_missing_expert="renormalize")
    client.until_ended(1)
    assert client.renormalized["first"] > 0
    cluster.restart(0)
    for name in ("second", "third"):
        client.submit(name, prompt)
        client.until(lambda name=name: name in client.finished)
    assert cluster.engine.counters()["prefix_tokens_reused"] == BLOCK_SIZE, "the third has what the second computed"
    assert client.tokens["second"] == client.tokens["third"] != client.tokens["first"]
    model = model_without(checkpoint, [-1] * 3)
    assert ids(client, "second") == model.greedy(prompt, STEPS, [0, 1])
