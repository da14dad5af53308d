"""The engine with real arithmetic: a request's tokens and logits do not depend on what else happens."""

import random
import threading

import pytest

from moering import protocol
from router.flight import Flight
from tests import tiny
from tests.router.mini_cluster import Client, MiniCluster, wait_for

# a compute thread that "dies" ends with SystemExit
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

PROMPTS = {f"q{i}": [5 + i, 6, 7 + 2 * i, 8, *list(range(10, 10 + 3 * i))] for i in range(8)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("checkpoint"), layers=3)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, checkpoint):
    """Each prompt alone, one after the other, whole prefill."""
    c = MiniCluster(tmp_path_factory.mktemp("reference"), checkpoint)
    client = Client(c.address)
    for n, (name, prompt) in enumerate(PROMPTS.items(), 1):
        client.submit(name, prompt)
        client.until_ended(n)
    client.socket.close()
    c.close()
    return dict(client.tokens)


def submit_all(client):
    for name, prompt in PROMPTS.items():
        client.submit(name, prompt)


@pytest.mark.parametrize(
    "cluster",
    [{}, {"max_num_batched_tokens": 5}, {"micro_batches": 2, "max_num_batched_tokens": 4}, {"threads": 1}],
    indirect=True,
)
def test_a_batch_gives_each_request_the_bits_it_has_alone(client, reference):
    submit_all(client)
    assert client.until_ended(len(PROMPTS)) == reference


class CountingPoller:
    def __init__(self, poller):
        self.poller, self.looks = poller, 0

    def poll(self, timeout):
        self.looks += timeout == 0
        return self.poller.poll(timeout)


def test_an_engine_that_spins_while_answers_are_awaited_gives_the_same_tokens(cluster, client, reference):
    poller = cluster.engine._poller = CountingPoller(cluster.engine._poller)
    cluster.engine._spin_s = 0.01
    submit_all(client)
    assert client.until_ended(len(PROMPTS)) == reference
    assert poller.looks > sum(len(tokens) for tokens in reference.values())


class Asynchronous:
    """A decoder whose `launch` returns while its work is under way, as on a GPU: until `done` says so."""

    def __init__(self, decoder, done):
        self.decoder, self.done = decoder, done
        self.away = set()  # micro-batches whose experts have not answered

    def __getattr__(self, name):
        return getattr(self.decoder, name)

    def launch(self, mb):
        self.decoder.launch(mb)
        return Work(self, mb)

    def after_experts(self, mb):
        self.away.discard(mb)
        self.decoder.after_experts(mb)


class Work:
    def __init__(self, decoder, mb):
        self.decoder, self.mb = decoder, mb
        self.others = frozenset(decoder.away)

    def query(self):
        done = self.decoder.done(self)
        if done:
            self.decoder.away.add(self.mb)
        return done

    def synchronize(self):
        assert not self.decoder.away, "there is an answer to be taken meanwhile"
        wait_for(self.query)


@pytest.mark.parametrize("cluster", [{"micro_batches": 2, "max_num_batched_tokens": 4}], indirect=True)
def test_answers_are_taken_while_the_gpu_computes_another_micro_batch(cluster, client, reference):
    """Each piece of the GPU's work ends when the experts of another micro-batch have answered, if any is away."""
    overlapped = []

    def done(work):
        if work.others and not work.others <= work.decoder.away:
            overlapped.append(work)
        return not work.others or not work.others <= work.decoder.away

    cluster.engine._decoder = Asynchronous(cluster.engine._decoder, done)
    cluster.engine._spin_s = 0.01
    submit_all(client)
    assert client.until_ended(len(PROMPTS)) == reference
    assert overlapped


def test_a_gpu_that_hangs_is_no_progress_and_holds_up_no_messages(cluster, client, reference):
    engine, released = cluster.engine, threading.Event()
    engine._decoder = Asynchronous(engine._decoder, lambda work: released.is_set())
    client.submit("q0", PROMPTS["q0"])
    wait_for(lambda: engine._launched)
    turns = engine.progress
    for name, prompt in list(PROMPTS.items())[1:]:
        client.submit(name, prompt)
    wait_for(lambda: engine.queued == len(PROMPTS))
    assert engine.progress <= turns + 1  # the turn in hand
    released.set()
    assert client.until_ended(len(PROMPTS)) == reference
    assert engine.progress > turns + 1


def test_a_resumed_request_goes_on_with_the_same_tokens(client, reference):
    tokens = [t for t, _ in reference["q3"]]
    client.tokens["q3"] = reference["q3"][:5]
    client.submit("q3", PROMPTS["q3"], emitted=tokens[:5])
    assert client.until_ended(1)["q3"] == reference["q3"]


def test_death_between_receive_and_reply_changes_nothing(cluster, client, reference):
    victim = cluster.servers[1]
    submit_all(client)
    client.until(lambda: len(client.tokens["q0"]) >= 3)
    victim.gate.clear()
    victim.entered.clear()
    assert victim.entered.wait(30)  # it has received, and will never answer
    threading.Thread(target=victim.die).start()
    assert client.until_ended(len(PROMPTS)) == reference
    counters = cluster.engine.counters()
    assert counters["dispatches_lost"] > 0
    assert counters["rows_resent"] == counters["rows_lost"]
    assert counters["tokens_recomputed"] == counters["forwards_dropped"] == 0
    assert counters["forward_rows"] == sum(len(p) + 15 for p in PROMPTS.values())


def test_all_holders_gone_parks_requests_until_one_is_back(cluster, client, reference):
    submit_all(client)
    client.until(lambda: len(client.tokens["q0"]) >= 3)
    cluster.servers[0].die()
    cluster.servers[1].die()
    wait_for(lambda: cluster.engine.gauges()["requests_parked"] > 0)
    cluster.restart(0)
    assert client.until_ended(len(PROMPTS)) == reference


def test_a_replica_that_is_back_before_other_rows_are_done_is_used(cluster, client, reference):
    """The return of a replica must not be missed because the flight that needs it has rows under way elsewhere."""
    slow, gone = cluster.servers[2], [cluster.servers[0], cluster.servers[1]]
    submit_all(client)
    client.until(lambda: len(client.tokens["q0"]) >= 3)
    slow.gate.clear()
    slow.entered.clear()
    assert slow.entered.wait(30)
    for server in gone:
        server.die()
    wait_for(lambda: set(cluster.exchange.suspects) == {"e0", "e1"})
    cluster.restart(0)
    wait_for(lambda: "e0" not in cluster.exchange.suspects)
    slow.gate.set()
    assert client.until_ended(len(PROMPTS)) == reference


@pytest.mark.parametrize("cluster", [{"missing_expert_timeout_s": 0.5}], indirect=True)
def test_waiting_for_an_expert_is_bounded(cluster, client):
    cluster.servers[0].die()
    cluster.servers[1].die()
    submit_all(client)
    client.until_ended(len(PROMPTS))
    assert set(client.failures.values()) == {"no_replica"}
    assert len(client.failures) == len(PROMPTS)
    wait_for(lambda: cluster.engine.queued == 0)
    cluster.engine._scheduler.check_integrity()


def test_a_request_that_will_not_wait_fails_at_once_and_others_go_on(cluster, client, reference):
    submit_all(client)
    client.submit("hasty", PROMPTS["q0"], on_missing_expert="fail", max_tokens=2000)
    client.until(lambda: len(client.tokens["hasty"]) >= 3)
    cluster.servers[0].die()
    cluster.servers[1].die()
    client.until(lambda: "hasty" in client.failures)
    assert client.failures == {"hasty": "no_replica"}
    cluster.restart(0)
    client.until_ended(len(PROMPTS) + 1)
    assert {name: client.tokens[name] for name in PROMPTS} == reference


@pytest.mark.parametrize("seed", range(4))
def test_connections_that_break_at_random_change_nothing(cluster, client, reference, seed):
    rng, exchange, poll = random.Random(seed), cluster.exchange, cluster.engine._poll

    def poll_in_trouble():
        if rng.random() < 0.05:
            for connection in [c for c in exchange._connections.values() if rng.random() < 0.7]:
                exchange._lose(connection, "the test broke it")
        poll()

    cluster.engine._poll = poll_in_trouble
    submit_all(client)
    assert client.until_ended(len(PROMPTS)) == reference
    counters = cluster.engine.counters()
    assert counters["servers_lost"] > 0
    assert counters["forward_rows"] == sum(len(p) + 15 for p in PROMPTS.values())


@pytest.mark.parametrize("cluster", [{"kv_cache_mb": 3, "max_num_seqs": 8}], indirect=True)
def test_preempted_requests_get_the_same_tokens(cluster, client, reference):
    submit_all(client)
    assert client.until_ended(len(PROMPTS)) == reference


def test_an_abort_frees_everything(cluster, client):
    client.submit("long", PROMPTS["q1"], max_tokens=3000)
    client.until(lambda: len(client.tokens["long"]) >= 2)
    client.socket.send(protocol.encode(protocol.Abort("long", 0)))
    wait_for(lambda: cluster.engine.queued == 0)
    cluster.engine._scheduler.check_integrity()


def test_a_prefix_from_the_cache_gives_the_bits_of_one_that_is_computed(cluster, client):
    """Blocks of prompts and of decoded tokens."""
    prompt = [5 + i * i % 300 for i in range(1030)]
    client.submit("first", prompt, max_tokens=520)
    client.until_ended(1)
    later = [*prompt, *(t for t, _ in client.tokens["first"])]
    assert len(later) // 512 == 3
    client.submit("fresh", [7, *later])
    client.submit("same", prompt)
    client.submit("longer", later)
    client.until_ended(4)
    assert cluster.engine.counters()["prefix_tokens_reused"] == (2 + 3) * 512
    assert client.tokens["same"] == client.tokens["first"][:16]
    cluster.engine._scheduler.prefixes._enabled = False
    cluster.engine._scheduler.prefixes._block_of.clear()
    cluster.engine._scheduler.prefixes._entries.clear()
    client.submit("computed", later)
    client.until_ended(5)
    assert cluster.engine.counters()["prefix_tokens_reused"] == (2 + 3) * 512
    assert client.tokens["computed"] == client.tokens["longer"]
    cluster.engine._scheduler.check_integrity()


def test_a_dead_gateways_requests_are_ended_even_if_nothing_is_sent_to_it(cluster, client, reference, caplog):
    """They are parked, and the next report of figures is far away."""
    dead = Client(cluster.address)
    dead.socket.send(protocol.encode(protocol.Hello("g", 1, "", "")))
    dead.receive()
    dead.submit("hung", PROMPTS["q2"], max_tokens=3000)
    client.submit("q1", PROMPTS["q1"])
    client.until_ended(1)
    for server in cluster.servers[:2]:
        server.die()
    wait_for(lambda: cluster.engine.gauges()["requests_parked"] == 1)
    assert cluster.engine.gauges()["kv_blocks_in_use"] > 0
    cluster.engine._next_report_s = float("inf")
    dead.socket.close()
    wait_for(lambda: cluster.engine.queued == 0)
    assert "1 requests of it are aborted" in caplog.text, "it waited until its time was over"
    assert cluster.engine.gauges()["kv_blocks_in_use"] == cluster.engine.gauges()["requests_parked"] == 0
    cluster.restart(0)
    client.submit("q2", PROMPTS["q2"])
    assert client.until_ended(2) == {name: reference[name] for name in ("q1", "q2")}


def test_gateways_count_from_their_hello_to_the_end_of_their_connection(cluster):
    gateways = [Client(cluster.address) for _ in range(2)]
    assert cluster.engine.gateways == 0
    for left, gateway in enumerate(gateways, 1):
        gateway.socket.send(protocol.encode(protocol.Hello(f"g{left}", 1, "", "")))
        gateway.receive()
        assert cluster.engine.gateways == left
    for left, gateway in enumerate(gateways):
        gateway.socket.close()
        wait_for(lambda left=left: cluster.engine.gateways == 1 - left)


def test_blocks_that_were_renormalized_are_not_shared(cluster, client, monkeypatch):
    prompt = [5 + i * i % 300 for i in range(600)]
    prefixes = cluster.engine._scheduler.prefixes
    with monkeypatch.context() as m:
        m.setattr(Flight, "renormalized_rows", lambda flight: [1] * len(flight.items))
        client.submit("inexact", prompt, max_tokens=2)
        client.until_ended(1)
        assert cluster.engine.counters()["tokens_renormalized"] > 0 and len(prefixes) == 0
    client.submit("exact", prompt, max_tokens=2)
    client.until_ended(2)
    assert (prefixes.tokens_reused, len(prefixes)) == (0, 1)


@pytest.mark.parametrize("cluster", [{"max_num_batched_tokens": 8, "published": False}], indirect=True)
def test_nothing_is_begun_before_the_router_has_met_its_servers(cluster, client, reference, caplog):
    """What began would be parked, and the next flight, and all of them go on at once when it has."""
    submit_all(client)
    wait_for(lambda: cluster.engine.queued == len(PROMPTS))
    turns = cluster.engine.progress
    wait_for(lambda: cluster.engine.progress > turns + 2)
    assert cluster.engine.forwards == 0
    cluster.publish()
    assert client.until_ended(len(PROMPTS)) == reference
    assert "no live replica" not in caplog.text


def test_requests_that_arrive_in_one_message_are_begun_in_one_step(cluster, client, reference):
    names = ["q0", "q3", "q5"]
    client.socket.send_multipart([client.message(name, PROMPTS[name], max_tokens=1) for name in names])
    assert client.until_ended(3) == {name: reference[name][:1] for name in names}
    assert (cluster.engine.forwards, cluster.engine.forward_rows) == (1, sum(len(PROMPTS[name]) for name in names))
