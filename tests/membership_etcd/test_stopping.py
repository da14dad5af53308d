"""Processes that are told to stop while etcd is gone, so that no view says who drains: real servers, a real etcd."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.etcd_nodes import EtcdNodes
from tests.faults.scenario import Scenario
from tests.integration.cluster import Cluster, serving, wait_for
from tests.tiny import write_checkpoint

DRAIN_S = 60.0  # of routers and expert servers; the launcher would kill them after 30
ALONE = ("no gateway is connected any more", "no router is connected any more")


def flags(etcd: EtcdNodes, drain_s: float) -> list[str]:
    drain = f"--drain-timeout-s {drain_s:g}"
    return [
        "--membership", etcd.membership, "--machine", "a", "--routers", "2", "--coordinator-args=--election-ttl-s 2",
        f"--router-args={drain}", f"--expert-server-args={drain}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", layers=4)


def lose(etcd: EtcdNodes, cluster: Cluster) -> None:
    etcd.kill()
    wait_for("the coordinator has noticed", lambda: cluster.logged("nothing is published until it does"))


def test_nobody_drains_until_the_time_is_up(etcd: EtcdNodes, checkpoint: Path, tmp_path: Path) -> None:
    with serving(checkpoint, tmp_path, flags(etcd, DRAIN_S)) as cluster:
        lose(etcd, cluster)
        assert cluster.stop() == 0
    assert not cluster.logged("did not stop in")
    assert [cluster.logged(why) for why in ALONE] == [len(cluster.routers), len(cluster.servers)]


def test_who_still_serves_others_drains_as_ever(etcd: EtcdNodes, checkpoint: Path, tmp_path: Path) -> None:
    """A gateway goes on sending to the router, and routers to the expert server: they go when their time is up."""
    with serving(checkpoint, tmp_path, flags(etcd, 2.0)) as cluster:
        scenario = Scenario(cluster)
        told = [cluster.process(v) for v in ("router-0", "expert-2", "router-1")]
        ends = [f"{p['id']} (pid {p['pid']}) ended with status 0" for p in told]
        lose(etcd, cluster)
        scenario.through(lambda _: cluster.kill("router-0", "expert-2", number=signal.SIGTERM) and None)
        wait_for("both have gone", lambda: all(map(cluster.logged, ends[:2])))
        cluster.kill("router-1", number=signal.SIGTERM)  # it computes nothing
        wait_for("it has gone", lambda: cluster.logged(ends[2]))
        assert [cluster.logged(why) for why in ALONE] == [0, 0]
        assert cluster.logged("going: the time for a drain is up") == 1
        etcd.start()
        cluster.wait_replaced(told)
