"""Two gateways and two routers on separate hosts, over tcp, with etcd: run by `make hosts-test`, as root on Linux.

Where this machine allows no network namespaces it fails and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hosts.cluster import HOSTS, Cluster, cluster
from tests.hosts.network import network
from tests.integration.cluster import wait_for
from tests.integration.streams import Stream, Streams, bodies, check_equal
from tests.tiny import write_checkpoint

STREAMS, TOKENS, FAULT_AT = 4, 160, 30


class Scenario:
    """Streams of both gateways, held against those of a run in which nothing failed."""

    def __init__(self, made: Cluster) -> None:
        self.cluster = made
        self.reference = self.start("a").finish()
        assert len({tuple(s.tokens) for s in self.reference}) == STREAMS
        check_equal(self.start("b").finish(), self.reference)

    def start(self, host: str) -> Streams:
        return Streams(self.cluster.url(host), bodies(STREAMS, TOKENS))

    def through(
        self, fault: Callable[[], None], heal: Callable[[], None] = lambda: None, *, seen_by: str = "ab"
    ) -> None:
        """`seen_by`: whose streams have to end before it heals."""
        streams = {host: self.start(host) for host in HOSTS}
        for s in streams.values():
            s.wait_tokens(FAULT_AT)
        fault()
        try:
            seen: list[list[Stream]] = [streams[host].finish() for host in seen_by]
        finally:
            heal()
        seen += [streams[host].finish() for host in HOSTS if host not in seen_by]
        for each in seen:
            check_equal(each, self.reference)


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scenario]:
    directory: Path = tmp_path_factory.mktemp("hosts")
    checkpoint = write_checkpoint(directory / "tiny", layers=4)
    with network(*HOSTS) as made, cluster(made, checkpoint, directory) as running:
        yield Scenario(running)


def test_what_processes_announce_is_reached_from_the_other_host(scenario: Scenario) -> None:
    addresses = scenario.cluster.network.addresses
    for process in scenario.cluster.status("a")["processes"]:
        own = addresses[process["id"].partition("-")[0]]
        assert f"//{own}:" in process["address"], process


def test_an_expert_server_of_the_other_host_dies(scenario: Scenario) -> None:
    made = scenario.cluster
    before = made.process("a", "b-expert-1")
    scenario.through(lambda: made.kill("b", "b-expert-1"))
    wait_for("it is back", lambda: made.process("a", "b-expert-1")["incarnation"] != before["incarnation"])
    made.wait_whole()


def test_the_hosts_are_cut_from_each_other(scenario: Scenario) -> None:
    """etcd and the clients reach both: each host's router goes on with its own expert servers."""
    made = scenario.cluster
    before = {h: [p["incarnation"] for p in made.status(h)["processes"]] for h in HOSTS}
    scenario.through(lambda: made.network.part(cut=True), lambda: made.network.part(cut=False))
    assert all("the connection is lost" in made.log(h) for h in HOSTS), "the cut hit nothing"
    made.wait_whole()
    after = {h: [p["incarnation"] for p in made.status(h)["processes"]] for h in HOSTS}
    assert {h: sorted(i) for h, i in after.items()} == {h: sorted(i) for h, i in before.items()}, "one was restarted"


@pytest.mark.parametrize("host", HOSTS)
def test_a_host_loses_its_link(scenario: Scenario, host: str) -> None:
    """The other one's streams end meanwhile; its own are held on the way to the client, and are whole once it is back.
    One of the two hosts has the elected coordinator."""
    made = scenario.cluster
    other = HOSTS[1 - HOSTS.index(host)]
    scenario.through(
        lambda: made.network.cut_off(host, cut=True), lambda: made.network.cut_off(host, cut=False), seen_by=other
    )
    made.wait_whole()
