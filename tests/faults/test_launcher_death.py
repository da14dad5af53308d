from __future__ import annotations

import signal
from pathlib import Path

import psutil

from tests.faults.launcher_end import runs
from tests.integration.cluster import TWO_ROUTERS, serving, wait_for


def test_a_killed_launcher_leaves_no_process(checkpoint: Path, tmp_path: Path) -> None:
    with serving(checkpoint, tmp_path, TWO_ROUTERS) as cluster:
        children = psutil.Process(cluster.launcher.pid).children(recursive=True)
        assert {p["pid"] for p in cluster.status()["processes"]} <= {cluster.launcher.pid, *(c.pid for c in children)}
        cluster.kill("expert-0", "router-1", "gateway-0", number=signal.SIGSTOP)  # they cannot act on anything
        cluster.launcher.kill()
        wait_for("all processes are gone", lambda: not any(map(runs, children)))
