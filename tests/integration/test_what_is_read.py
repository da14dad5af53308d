"""Which bytes of the checkpoint a process reads, and which libraries."""

from __future__ import annotations

import threading
from pathlib import Path

from expert_server.config import Config as ExpertConfig
from expert_server.process import ExpertServer
from moering.checkpoint import Checkpoint
from moering.protocol import Leave
from router.config import Config as RouterConfig
from router.process import Router
from tests.integration.cluster import Cluster, wait_for


def test_a_router_reads_no_expert(checkpoint: Path, tmp_path: Path) -> None:
    reference = Checkpoint(checkpoint)
    for name in reference.names():
        reference.tensor(name)
    router = Router(RouterConfig(checkpoint=str(checkpoint), bind=f"ipc://{tmp_path}/r", kv_cache_mb=64))
    assert 0 < router.checkpoint.bytes_read <= reference.bytes_read
    size = sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
    bytes_read = router.checkpoint.bytes_read
    router.engine.stop()
    router.engine.run()  # closes its sockets in the right order; collected as garbage they hang the I/O thread of all
    assert size - bytes_read > reference.num_layers * reference.num_experts * reference.expert_bytes


def test_an_expert_server_reads_its_own_experts_only(cluster: Cluster, checkpoint: Path, tmp_path: Path) -> None:
    """A fourth server, in this process, joins the cluster and gets a share."""
    join = cluster.process("coordinator")["address"]
    server = ExpertServer(ExpertConfig(str(checkpoint), join, bind=f"ipc://{tmp_path}/e", id="expert-3", nice=False))
    server.service.start()
    server.lease.start()
    try:
        threading.Thread(target=server._join_cluster, name="join", daemon=True).start()
        wait_for("it is online or has failed", lambda: server.state == "ONLINE" or server._failure)
        assert server._failure is None
        own = len(server.residency.keys())
        assert 0 < own < server.checkpoint.num_layers * server.checkpoint.num_experts
        assert server.checkpoint.bytes_read == own * server.checkpoint.expert_bytes
    finally:
        server.lease.close(Leave(server.id, server.incarnation))
        server.service.close()
    cluster.wait_settled()
