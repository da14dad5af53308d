"""Random checkpoints of Qwen3-30B-A3B's shape, and how many of its layers fit the GPUs at hand."""

from __future__ import annotations

import json
import os
from pathlib import Path

from bench.random_checkpoint import Shape, write

LAYERS = 48
EXPERT_GB = 128 * 3 * 768 * 2048 * 2 / 1e9
"""All experts of a layer."""
ROOM = 1.25
"""Slots of the expert servers, as a multiple of the replicas that they hold in calm: room to move."""
_OTHER_GB = 8.0  # contexts, embeddings, head, workspaces
_CACHE_GB = 0.15  # of a layer, for the streams of one engine
INDEX = "model.safetensors.index.json"


def write_checkpoint(directory: Path, layers: int, tiny: bool = False) -> Path:
    """Write so many layers from seed 0, all processors at once; `tiny` for trying a bench out on CPUs."""
    jobs = os.cpu_count() or 1
    if tiny:
        shape = Shape(str(directory), "qwen3_moe", layers=layers, hidden=64, intermediate=32, experts=16, top_k=4)
    else:
        shape = Shape(
            str(directory), "qwen3_moe", layers=layers, hidden=2048, intermediate=768, experts=128, top_k=8, heads=32,
            kv_heads=4, head_dim=128, vocab=151936, dtype="bfloat16", jobs=jobs,
        )  # fmt: skip
    return write(shape)


def fewer_layers(source: Path, directory: Path, layers: int) -> Path:
    """A checkpoint of the first layers of `source`: links to its shards, an index and a configuration of its own."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.name not in (INDEX, "config.json"):
            (directory / file.name).symlink_to(file.resolve())
    config = json.loads((source / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    index = json.loads((source / INDEX).read_text())
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if _layer(n) < layers}
    (directory / INDEX).write_text(json.dumps(index))
    return directory


def layers_that_fit(gpu_gb: float, gpus: int) -> int:
    """So many that each GPU holds an engine with all experts, and those after the first an expert server's share too.

    Every expert has two replicas, or one where there is only one GPU for them.
    """
    replicas_here = min(2.0, gpus - 1) / max(1, gpus - 1) if gpus > 1 else 1.0
    layer_gb = EXPERT_GB * (1 + ROOM * replicas_here) + _CACHE_GB
    return max(1, min(LAYERS, int((0.95 * gpu_gb - _OTHER_GB) / layer_gb)))


def _layer(name: str) -> int:
    """The layer of a tensor; -1 outside of them."""
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else -1
