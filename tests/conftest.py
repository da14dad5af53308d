"""Which tests may run beside each other when there are two workers (`make check`)."""

from __future__ import annotations

from typing import Any

import pytest

CLUSTERS = ("compose", "elastic", "faults", "hosts", "integration", "membership_etcd")
"""Directories with tests of whole clusters: one at a time, as each takes both cores at times."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """All tests of whole clusters to one worker, those of any other file to one worker as well."""
    from xdist.scheduler import LoadFileScheduling

    class Groups(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "clusters" if file.split("/")[1] in CLUSTERS else file

    return Groups(config, log)
