from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.scenario import Scenario
from tests.integration.cluster import Cluster, serving
from tests.tiny import write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", layers=4)


@pytest.fixture(scope="module")
def module_cluster(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with serving(checkpoint, tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def module_scenario(module_cluster: Cluster) -> Scenario:
    return Scenario(module_cluster)


@pytest.fixture
def scenario(module_scenario: Scenario) -> Scenario:
    """Whole again after whatever the test before did."""
    module_scenario.cluster.wait_settled()
    return module_scenario
