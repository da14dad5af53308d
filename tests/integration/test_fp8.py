"""A cluster that serves fp8 weights, on a GPU where there is one: a death of an expert server changes no token."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.random_checkpoint import Shape, write
from tests.faults.scenario import Scenario
from tests.integration.cluster import Cluster, serving

CUDA = torch.cuda.is_available()
STREAMS, TOKENS = 4, 120
# without a GPU also the edges of blocks, which its kernels do not take
SIZES = {"hidden": 2048, "intermediate": 768} if CUDA else {"hidden": 160, "intermediate": 136}
HEADS = {"heads": 32, "kv_heads": 4, "head_dim": 128} if CUDA else {"heads": 4, "kv_heads": 2, "head_dim": 32}
EXPERTS = {"experts": 128, "top_k": 8} if CUDA else {"experts": 8, "top_k": 2}
ON_GPU = (
    "--device", "cuda", "--router-args", "--kv-cache-mb 1024 --max-model-len 2048",
    "--expert-server-args", f"--capacity {2 * 128} --load-threads 3 --host-replicas 32",
)  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("fp8")
    shape = Shape(str(directory / "tiny"), "qwen3_moe", layers=2, dtype="fp8", jobs=3, **SIZES, **HEADS, **EXPERTS)
    with serving(write(shape), directory, ON_GPU if CUDA else ()) as cluster:
        yield cluster
    shutil.rmtree(directory / "tiny")


def test_a_dead_server_changes_no_token(cluster: Cluster) -> None:
    scenario = Scenario(cluster, STREAMS, TOKENS)
    killed: list[dict[str, Any]] = []
    scenario.through_death_of_servers(lambda _: killed.extend(cluster.kill("expert-1")), ["expert-1"])
    cluster.wait_replaced(killed)
