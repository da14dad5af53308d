"""Two routers, and one or both of them die, stop or lose their gateway: clients notice nothing but a pause."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from moering.http_client import HttpError, get_json
from tests.faults.requests import check_whole, varied, whole
from tests.faults.scenario import in_the_middle
from tests.integration.cluster import REPO, SERVERS, TWO_ROUTERS, Cluster, metrics, serving, wait_for
from tests.integration.streams import Stream, Streams, bodies, check_equal
from tests.ports import free_port

STREAMS, TOKENS, FAULT_AT = 8, 200, 30
WAITS = "router.parking: layer 0: no live replica for rows"
MISSED = "router router-0 was lost: disconnected"


class Pair:
    """A cluster with two routers, and what varied streams bring when nothing fails."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.bodies = varied(cluster.url, STREAMS, TOKENS)
        self.reference = Streams(cluster.url, self.bodies).finish()
        check_whole(self.reference, self.reference)
        choices = [whole(s) for s in self.reference]
        assert [c[0]["ends"] for c in choices] == [["length"]] * (STREAMS - 1) + [["stop"]]
        assert min(len(c[0]["ids"]) for c in choices) > 2 * FAULT_AT
        assert choices[0][-1]["completion_tokens"] == TOKENS and choices[3][-1]["completion_tokens"] == 2 * TOKENS
        assert len(choices[1][0]["top_logprobs"]) == TOKENS

    def failovers(self) -> int:
        return int(self.cluster.metrics()["moering_failovers_total"])

    def through(self, fault: Callable[[Streams], None]) -> list[Stream]:
        """Run all streams, call `fault` in their middle, and check that nobody can tell by what he got."""
        seen = in_the_middle(self.cluster, self.bodies, FAULT_AT, fault)
        check_whole(seen, self.reference)
        return seen


@pytest.fixture(scope="module")
def shared_pair(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with serving(checkpoint, tmp_path_factory.mktemp("pair"), TWO_ROUTERS) as cluster:
        yield Pair(cluster)


@pytest.fixture
def pair(shared_pair: Pair) -> Pair:
    """Whole again after whatever the test before did."""
    shared_pair.cluster.wait_settled()
    routers = ("router-0", "router-1")
    wait_for("both routers are in use", lambda: all(_in_use(shared_pair.cluster, r) for r in routers))
    return shared_pair


def test_a_router_dies_in_decode(pair: Pair) -> None:
    before, other = pair.failovers(), pair.cluster.process("router-1")
    killed: list[dict[str, Any]] = []
    pair.through(lambda _: killed.extend(pair.cluster.kill("router-0")))
    moved = pair.failovers() - before
    assert 0 < moved < STREAMS + 2, f"{moved} of {STREAMS + 2} choices were at router-0"
    assert pair.cluster.process("router-1")["incarnation"] == other["incarnation"]
    pair.cluster.wait_replaced(killed)


def test_both_routers_die_at_once_and_again(pair: Pair) -> None:
    """Streams are held until one is there again; then that one dies, too."""
    cluster, moved = pair.cluster, [pair.failovers()]
    killed: dict[str, dict[str, Any]] = {}

    def kill(*routers: str) -> None:
        killed.update(zip(routers, cluster.kill(*routers), strict=True))

    def fault(streams: Streams) -> None:
        kill(*cluster.routers)
        had = [(s, len(s.tokens)) for s in streams.streams]
        wait_for("each goes on, one with the router that is back first", lambda: all(map(_went_on, had)))
        assert not all(s.closed for s in streams.streams), "too late: all streams have ended already"
        moved.append(pair.failovers())
        kill(*(r for r in cluster.routers if cluster.is_replaced(killed[r])))

    pair.through(fault)
    # Two of the streams have two choices. Some move twice, when one death is noticed a moment before the other.
    assert moved[1] - moved[0] >= STREAMS + 2
    assert pair.failovers() > moved[1]
    cluster.wait_replaced(list(killed.values()))


def test_a_router_dies_in_prefill(pair: Pair) -> None:
    """All expert servers stand still while it does, so that it cannot have gone further than the first layers."""
    cluster, before, requests = pair.cluster, pair.failovers(), bodies(4, 8)
    for index, body in enumerate(requests):
        body["prompt"] = [20 + (index + i * i) % 280 for i in range(700)]
    killed: list[dict[str, Any]] = []

    def submit() -> Streams:
        waited = cluster.logged(WAITS)
        cluster.kill(*SERVERS, number=signal.SIGSTOP)
        streams = Streams(cluster.url, requests)
        wait_for("both routers' prompts wait for experts", lambda: cluster.logged(WAITS) >= waited + 2)
        assert not any(stream.tokens for stream in streams.streams)
        return streams

    try:
        streams = submit()
        killed.extend(cluster.kill("router-1"))
    finally:
        cluster.kill(*SERVERS, number=signal.SIGCONT)
    seen = streams.finish()
    assert pair.failovers() > before, "it had some of them"
    cluster.wait_replaced(killed)
    check_equal(seen, Streams(cluster.url, requests).finish())
    # routers report once a second; the second run found what the first had computed
    wait_for("a prefix is reused", lambda: cluster.counters().get("prefix_tokens_reused", 0) > 0)


def test_a_stopped_router_that_wakes_up_beside_its_replacement(pair: Pair) -> None:
    cluster, before = pair.cluster, pair.failovers()
    aborted, missed = cluster.logged("of it are aborted"), cluster.logged(MISSED)
    stopped = cluster.process("router-0")

    def stop(streams: Streams) -> None:
        with cluster.stopped("router-0"):
            wait_for("its streams go on elsewhere", lambda: pair.failovers() > before)

    pair.through(stop)
    assert cluster.logged(MISSED) > missed, "by the heartbeats, which take a second, not by a silence of ten"
    wait_for("it aborts what it had", lambda: cluster.logged("of it are aborted") > aborted)
    wait_for("no block is in use", lambda: cluster.metrics()["moering_router_kv_blocks_in_use"] == 0)
    cluster.wait_settled()
    assert cluster.process("router-0")["incarnation"] == stopped["incarnation"]
    pair.through(lambda _: None)


def test_a_killed_gateway_takes_nobody_with_it(pair: Pair, tmp_path: Path) -> None:
    cluster = pair.cluster
    with second_gateway(cluster, tmp_path) as (url, process):
        lost = Streams(url, bodies(4, 3500))
        lost.wait_tokens(5)

        def kill_it(streams: Streams) -> None:
            aborted = cluster.logged("of it are aborted")
            process.kill()
            wait_for("both routers abort its requests", lambda: cluster.logged("of it are aborted") == aborted + 2)
            assert not any(s.closed for s in streams.streams), "too late: the other gateway's streams have ended"

        pair.through(kill_it)
        seen = lost.finish()
    assert not any(s.done_lines or "length" in s.ends for s in seen), "what is lost is not to look complete"
    wait_for("no block is in use", lambda: cluster.metrics()["moering_router_kv_blocks_in_use"] == 0)
    assert cluster.metrics()["moering_router_requests_running"] == 0


@contextmanager
def second_gateway(cluster: Cluster, directory: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """One started by hand: its URL and the process."""
    join = next(p["address"] for p in cluster.status()["processes"] if p["kind"] == "coordinator")
    port = free_port()
    argv = [sys.executable, "-m", "moering", "gateway", "--checkpoint", str(cluster.checkpoint), "--join", join]
    argv += ["--id", "gateway-1", "--port", str(port), "--served-model-name", "tiny"]
    with (directory / "gateway-1.log").open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, cwd=REPO, env=os.environ)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"the second gateway, see {directory}/gateway-1.log", lambda: _serves_with_two_routers(url))
        yield url, process
    finally:
        process.kill()
        process.wait()


def _went_on(stream_and_tokens: tuple[Stream, int]) -> bool:
    stream, had = stream_and_tokens
    return stream.closed or len(stream.tokens) > had + 5


def _in_use(cluster: Cluster, router: str) -> bool:
    """The gateway is connected to this incarnation of the router, and the router to all expert servers."""
    _, online, since = cluster.log.read_text(errors="replace").rpartition(f"{router} router.process: online at")
    met = [f"connected to router {router}", *(f"{router} router.exchange: connected to {s}" for s in SERVERS)]
    lost = since.rfind(f"router {router} was lost")  # one that stood still is connected to again
    return bool(online) and all(text in since for text in met) and since.rfind(met[0]) > lost


def _serves_with_two_routers(url: str) -> bool:
    try:
        get_json(f"{url}/ready")
    except HttpError:
        return False
    return metrics(url)["moering_routers_connected"] == 2
