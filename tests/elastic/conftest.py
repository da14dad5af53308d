from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.scenario import Scenario
from tests.integration.cluster import Cluster, serving
from tests.tiny import write_checkpoint


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One for all tests of this folder; each leaves it with three expert servers, a router and a gateway."""
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", layers=3)
    with serving(checkpoint, tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="package")
def scenario(cluster: Cluster) -> Scenario:
    """What the streams bring when nothing happens."""
    return Scenario(cluster)
