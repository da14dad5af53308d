from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults import matrix, subset, summary
from tests.faults.scenario import Scenario
from tests.integration.cluster import Cluster, serving
from tests.tiny import write_checkpoint


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-cells", default="subset", help="subset, all, or part of the names of cells")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" not in metafunc.fixturenames:
        return
    wanted = metafunc.config.getoption("--fault-cells", default="subset")
    if wanted == "subset":
        cells = subset.read()
    else:
        cells = [c for c in matrix.POSSIBLE if wanted == "all" or wanted in c.name]
    metafunc.parametrize("cell", cells, ids=[c.name for c in cells])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.getoption("--fault-cells", default="subset") != "subset":
        reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, ())]
        terminalreporter.write_line(summary.text(reports))


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
