"""The whole hop with the GPU's parts on both sides: engine, sockets, expert servers, a death in between. Interpreted
without a GPU, one kernel at a time, since the interpreter is not made for threads."""

from __future__ import annotations

import threading

import pytest

from expert_server.backend_cuda import CudaBackend
from expert_server.formats_cuda import Bf16
from router import device
from router.decoder_cuda import Decoder
from tests.interpreter import DEVICE
from tests.router import mini_cluster
from tests.router.mini_cluster import Client, MiniCluster
from tests.tiny import write_checkpoint

# a compute thread that "dies" ends with SystemExit
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

TOKENS = 4
PROMPTS = {"a": [5, 6, 7], "b": [8, 9]}
_one_at_a_time = threading.RLock()


class OneAtATime(Decoder):
    def launch(self, mb):
        with _one_at_a_time:
            return super().launch(mb)

    def logits(self, mb, rows):
        with _one_at_a_time:
            return super().logits(mb, rows)


class Backend(CudaBackend):
    """One for all servers of the mini cluster."""

    def __init__(self, arithmetic, threads):
        super().__init__(Bf16(64, 96), 99, device=DEVICE)
        if DEVICE == "cpu":  # all memory there is like pinned memory: rows are read and written in the slots
            self.pin = lambda memory: lambda: None

    def compute(self, *args):
        with _one_at_a_time:
            super().compute(*args)


@pytest.fixture
def cluster(tmp_path, tmp_path_factory, monkeypatch):
    path = write_checkpoint(tmp_path_factory.mktemp("c"), "qwen3_moe", layers=2, dtype="BF16")
    monkeypatch.setattr(mini_cluster, "CpuBackend", Backend)
    monkeypatch.setattr(
        device, "build_parts", lambda config, checkpoint, _: device.cuda_parts(config, checkpoint, OneAtATime, DEVICE)
    )
    cluster = MiniCluster(tmp_path, path, max_model_len=600)
    yield cluster
    cluster.close()


def test_a_dead_server_changes_no_token(cluster):
    calm = answers(cluster)
    assert [len(tokens) for tokens in calm.values()] == [TOKENS] * len(PROMPTS)
    victim = cluster.servers[0]
    victim.gate.clear()
    victim.entered.clear()
    client = Client(cluster.address)
    for name, prompt in PROMPTS.items():
        client.submit(name, prompt, max_tokens=TOKENS)
    assert victim.entered.wait(mini_cluster.DEADLINE_S)  # it has rows that nobody else has
    victim.die()
    assert ids(client.until_ended(len(PROMPTS))) == calm
    assert cluster.exchange.dispatcher.counters.rows_resent > 0


def test_requests_that_were_parked_get_the_same_tokens(cluster):
    calm = answers(cluster)
    for server in cluster.servers[:2]:
        server.gate.clear()
        server.entered.clear()
    client = Client(cluster.address)
    for name, prompt in PROMPTS.items():
        client.submit(name, prompt, max_tokens=TOKENS)
    for server in cluster.servers[:2]:
        assert server.entered.wait(mini_cluster.DEADLINE_S)
        server.die()
    mini_cluster.wait_for(lambda: cluster.engine.gauges()["requests_parked"] == len(PROMPTS))
    cluster.restart(0)
    assert ids(client.until_ended(len(PROMPTS))) == calm


def test_rows_in_bf16_and_in_float32_give_the_same_logits(cluster, tmp_path):
    """Two routers at the same servers; one request at a time, as the interpreter's bits depend on the batch."""
    wide = MiniCluster(tmp_path, cluster.checkpoint.path, beside=cluster, dtype="float32", max_model_len=600)
    digests = []
    for each, dtype in ((cluster, "bfloat16"), (wide, "float32")):
        client = Client(each.address)
        client.submit("a", PROMPTS["a"], max_tokens=TOKENS)
        digests.append(client.until_ended(1)["a"])
        assert {c._dtype for c in each.exchange._connections.values()} == {dtype}
    wide.close()
    assert digests[0] == digests[1] and len(digests[0]) == TOKENS


def answers(cluster):
    client = Client(cluster.address)
    for name, prompt in PROMPTS.items():
        client.submit(name, prompt, max_tokens=TOKENS)
    return ids(client.until_ended(len(PROMPTS)))


def ids(tokens):
    return {name: [token for token, _ in tokens[name]] for name in sorted(tokens)}
