"""A cluster that serves fp8 weights, on a GPU where there is one: a death of an expert server changes no token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.faults.scenario import Scenario
from tests.fp8 import quantize
from tests.integration.cluster import Cluster, serving
from tests.tiny import write_checkpoint

CUDA = torch.cuda.is_available()
STREAMS, TOKENS = 4, 120
# on a GPU Qwen3's sizes; without one also the edges of blocks, which the GPU's kernels do not take
SIZES: dict[str, int] = {"hidden": 160, "intermediate": 136}
if CUDA:
    SIZES = {
        "hidden": 2048,
        "intermediate": 768,
        "experts": 32,
        "top_k": 8,
        "heads": 32,
        "kv_heads": 4,
        "head_dim": 128,
    }
ON_GPU = (
    "--device", "cuda", "--router-args", "--kv-cache-mb 1024 --max-model-len 2048",
    "--expert-server-args", "--capacity 64 --load-threads 3 --host-replicas 16",
)  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("fp8")
    plain = write_checkpoint(directory / "plain", "qwen3_moe", dtype="BF16", **SIZES)
    with serving(quantize(plain, directory / "tiny"), directory, ON_GPU if CUDA else ()) as cluster:
        yield cluster


def test_a_dead_server_changes_no_token(cluster: Cluster) -> None:
    scenario = Scenario(cluster, STREAMS, TOKENS)
    killed: list[dict[str, Any]] = []
    scenario.through_death_of_servers(lambda _: killed.extend(cluster.kill("expert-1")), ["expert-1"])
    cluster.wait_replaced(killed)
