from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.etcd_nodes import EtcdNodes, running
from tests.membership_etcd.members import Cluster, cluster


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdNodes]:
    """A new etcd of one node. Where this machine has none the test fails: that must not look like success."""
    with running(tmp_path) as nodes:
        yield nodes


@pytest.fixture
def members(etcd: EtcdNodes, tmp_path: Path) -> Iterator[Cluster]:
    with cluster(etcd, tmp_path) as made:
        yield made
