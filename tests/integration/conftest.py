from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.cluster import Cluster, serving
from tests.tiny import write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", layers=3)


@pytest.fixture(scope="package")
def cluster(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One for all tests of this folder: none of them breaks anything."""
    with serving(checkpoint, tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster
