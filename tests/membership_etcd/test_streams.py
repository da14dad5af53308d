"""Streams through failures of the elected coordinator and of etcd: real servers, three etcd nodes, equal tokens."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.etcd_nodes import EtcdNodes, running
from tests.faults.scenario import Scenario
from tests.integration.cluster import Cluster, serving, wait_for
from tests.integration.streams import Streams
from tests.membership_etcd.members import Candidate
from tests.tiny import write_checkpoint


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("etcd")


@pytest.fixture(scope="module")
def etcd(directory: Path) -> Iterator[EtcdNodes]:
    with running(directory, 3) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def cluster(etcd: EtcdNodes, directory: Path) -> Iterator[Cluster]:
    checkpoint = write_checkpoint(directory / "tiny", layers=4)
    flags = ["--membership", etcd.membership, "--machine", "a", "--coordinator-args=--election-ttl-s 2"]
    with serving(checkpoint, directory, flags) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def scenario(cluster: Cluster) -> Scenario:
    return Scenario(cluster)


def coordinator(cluster: Cluster) -> str:
    """The id of the elected one, as the members see it."""
    return next(str(p["id"]) for p in cluster.status()["processes"] if p["kind"] == "coordinator")


def incarnation(cluster: Cluster) -> int:
    """The incarnation of the elected one, as the members see it."""
    return next(int(p["incarnation"]) for p in cluster.status()["processes"] if p["kind"] == "coordinator")


def kill(cluster: Cluster, *victims: str) -> None:
    cluster.kill(*victims)


def test_the_leader_of_three_etcd_nodes_dies(scenario: Scenario, etcd: EtcdNodes) -> None:
    cluster = scenario.cluster
    elected, leader = coordinator(cluster), etcd.leader()

    def fault(_: Streams) -> None:
        leader.signal(signal.SIGKILL)
        cluster.kill("expert-1")  # what follows has to be published without that node

    dead = cluster.process("expert-1")
    scenario.through_death_of_servers(fault, ["expert-1"])
    cluster.wait_replaced([dead])
    assert coordinator(cluster) == elected
    assert not cluster.logged("no longer the elected coordinator")
    leader.start(etcd.nodes)


def test_the_elected_coordinator_dies_and_then_an_expert_server(
    scenario: Scenario, etcd: EtcdNodes, directory: Path
) -> None:
    """Whoever is elected then: the one that waited, or the one that the launcher has started again."""
    cluster = scenario.cluster
    other = Candidate("b", etcd.membership, directory, "--expert-servers", "3")
    try:
        wait_for("it waits for the office", lambda: other.said("waiting for its end"))
        first, dead = incarnation(cluster), cluster.process("expert-2")
        scenario.through_death_of_servers(lambda _: kill(cluster, "coordinator", "expert-2"), ["expert-2"])
        cluster.wait_replaced([dead])
        second = incarnation(cluster)
        assert second != first
        waited = coordinator(cluster) == "b"
        scenario.through(lambda _: other.close() if waited else kill(cluster, "coordinator"))
        wait_for("another one is elected", lambda: incarnation(cluster) not in (first, second))
    finally:
        other.close()
    wait_for("the launcher's own is elected", lambda: coordinator(cluster) == "a-coordinator")
    cluster.wait_settled()


def test_a_stopped_coordinator_wakes_up_beside_its_successor(
    scenario: Scenario, etcd: EtcdNodes, directory: Path
) -> None:
    cluster = scenario.cluster
    other = Candidate("b", etcd.membership, directory, "--expert-servers", "3")
    stopped, deposed = cluster.process("coordinator"), cluster.logged("no longer the elected coordinator")

    def stop(_: Streams) -> None:
        cluster.kill("coordinator", number=signal.SIGSTOP)
        wait_for("another is elected", lambda: coordinator(cluster) == "b")

    def wake(_: Streams) -> None:
        os.kill(stopped["pid"], signal.SIGCONT)
        cluster.kill("expert-2")  # what follows only one of the two may decide

    try:
        wait_for("it waits for the office", lambda: other.said("waiting for its end"))
        scenario.through(stop)
        dead = cluster.process("expert-2")
        scenario.through_death_of_servers(wake, ["expert-2"])
        wait_for("it has noticed", lambda: cluster.logged("no longer the elected coordinator") > deposed)
        cluster.wait_replaced([dead])
        assert coordinator(cluster) == "b"
    finally:
        os.kill(stopped["pid"], signal.SIGCONT)
        other.close()
    wait_for("it is elected again", lambda: coordinator(cluster) == "a-coordinator")
    assert cluster.process("coordinator")["pid"] == stopped["pid"]
    cluster.wait_settled()


def test_all_of_etcd_dies_and_an_expert_server_while_it_is_gone(scenario: Scenario, etcd: EtcdNodes) -> None:
    cluster = scenario.cluster
    unpublished = cluster.logged("nothing is published until it does")
    dead = cluster.process("expert-0")

    def fault(_: Streams) -> None:
        etcd.kill()
        cluster.kill("expert-0")

    scenario.through_death_of_servers(fault, ["expert-0"])
    wait_for("the coordinator has noticed", lambda: cluster.logged("nothing is published until it does") > unpublished)
    assert cluster.process("expert-0")["incarnation"] == dead["incarnation"], "a view came from nowhere"
    scenario.through(lambda _: None)
    etcd.start()
    cluster.wait_replaced([dead])
    assert coordinator(cluster) == "a-coordinator"
