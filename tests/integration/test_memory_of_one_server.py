"""What an expert server that was started alone, and not forked, takes beside its experts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from tests.integration.cluster import DEADLINE_S, REPO, Cluster, wait_for

BESIDE_EXPERTS_BYTES = 215_000_000
"""What is left of the bar (docs/benchmarks.md) with a server's share of the default model: of 400 MB and a fifth of the
425 MB that its experts have in the file, less the 63 % that packing adds. The experts of this test are a few MB."""


@pytest.mark.skipif(torch.version.cuda is not None, reason="PyTorch for CUDA takes more, also without a GPU")
def test_a_server_started_alone_takes_little_beside_its_experts(
    cluster: Cluster, checkpoint: Path, tmp_path: Path
) -> None:
    join = cluster.process("coordinator")["address"]
    argv = [sys.executable, "-m", "expert_server", "--checkpoint", str(checkpoint), "--join", join]
    argv += ["--bind", f"ipc://{tmp_path}/e", "--id", "expert-3", "--no-nice"]
    server = subprocess.Popen(argv, cwd=REPO, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        wait_for("it is online", lambda: server.poll() is not None or _holds_experts(cluster))
        wait_for("it takes little", lambda: psutil.Process(server.pid).memory_info().rss < BESIDE_EXPERTS_BYTES, 5)
    finally:
        server.terminate()
        server.wait(DEADLINE_S)
    cluster.wait_settled()


def _holds_experts(cluster: Cluster) -> bool:
    return any(
        p["id"] == "expert-3" and p["state"] == "ONLINE" and p["experts"] > 0 for p in cluster.status()["processes"]
    )
