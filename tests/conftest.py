"""Which tests may run beside each other when there are two workers (`make check`)."""

from __future__ import annotations

from pathlib import Path

import pytest

PROCESSES = ("compose", "elastic", "faults", "hosts", "integration", "membership_etcd")
"""Tests of whole clusters: one at a time, as each takes both cores at times."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """All tests of whole clusters to one worker, those of any other file to one worker as well."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        path = item.path.relative_to(Path(__file__).parent)
        group = "processes" if path.parts[0] in PROCESSES else str(path)
        item.add_marker(pytest.mark.xdist_group(group))
