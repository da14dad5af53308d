"""Checkpoints with block-scaled fp8 weights: what is read, and every way in which they can be wrong."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moering.checkpoint import Checkpoint
from moering.errors import CheckpointError
from moering.quantization import is_quantized
from tests.fp8 import QUANTIZATION, quantize
from tests.moering.test_checkpoint import INDEX, edit_header, set_config
from tests.tiny import write_checkpoint

EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
SHARD = "model.safetensors"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Experts of 160 x 136: blocks are cut at both edges."""
    return quantize(write_checkpoint(tmp_path / "plain", hidden=160, intermediate=136), tmp_path / "model")


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_an_expert_comes_with_its_scales(tmp_path: Path, scale_dtype: torch.dtype) -> None:
    plain = write_checkpoint(tmp_path / "plain", "qwen3_moe", hidden=160, intermediate=136)
    checkpoint = Checkpoint(quantize(plain, tmp_path / "model", scale_dtype))
    stored = load_file(tmp_path / "model" / SHARD)
    weights = checkpoint.expert(1, 5)
    digest = hashlib.sha256()
    for name, part in zip(("gate_proj", "up_proj", "down_proj"), weights.parts, strict=True):
        weight = stored[f"model.layers.1.mlp.experts.5.{name}.weight"]
        scale = stored[f"model.layers.1.mlp.experts.5.{name}.weight_scale_inv"]
        assert (part.dtype, part.shape) == ("F8_E4M3", tuple(weight.shape))
        assert part.data.tobytes() == weight.view(torch.uint8).numpy().tobytes()
        assert part.scale.data.tobytes() == scale.view(torch.uint8).numpy().tobytes()
        assert part.scale.shape == (2, 2)
        digest.update(part.data.tobytes() + part.scale.data.tobytes())
    assert weights.digest == digest.digest()[:8]
    size = 3 * (160 * 136 + 4 * scale_dtype.itemsize)
    assert checkpoint.bytes_read == checkpoint.expert_bytes == size
    assert checkpoint.packed_expert_bytes(512) == 2 * (2 * 136 + 160) * 512  # what a CPU holds
    assert checkpoint.packed_expert_bytes(1) == 2 * 3 * 136 * 160
    assert checkpoint.expert_dtypes == {"F8_E4M3"}


def test_only_the_bytes_asked_for_are_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, from_kernel, preadv = Checkpoint(path), [], os.preadv

    def counting_preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        from_kernel.append(preadv(fd, buffers, offset))
        return from_kernel[-1]

    monkeypatch.setattr(os, "preadv", counting_preadv)
    checkpoint.expert(1, 5)
    assert sum(from_kernel) == checkpoint.bytes_read == checkpoint.expert_bytes
    for name in checkpoint.names():
        checkpoint.tensor(name)
    stored = load_file(path / SHARD)
    dense = sum(value.nbytes for name, value in stored.items() if ".experts." not in name)
    assert sum(from_kernel) == checkpoint.bytes_read == checkpoint.expert_bytes + dense


def test_a_tensor_outside_the_experts_comes_with_its_scales(path: Path) -> None:
    checkpoint = Checkpoint(path)
    assert checkpoint.tensor(QUERY).scale.shape == (1, 2)
    assert checkpoint.tensor("lm_head.weight").scale is None
    assert not [name for name in checkpoint.names() if "scale" in name]
    with pytest.raises(CheckpointError, match="no tensor"):
        checkpoint.tensor(EXPERT + "_scale_inv")


def test_a_scale_that_differs_makes_another_expert(path: Path) -> None:
    before = Checkpoint(path).expert(1, 3).digest
    change(EXPERT + "_scale_inv", lambda scale: scale * 2)(path)
    assert Checkpoint(path).expert(1, 3).digest != before


def change(name: str, new: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        tensors = load_file(path / SHARD)
        save_file(tensors | {name: new(tensors[name])}, path / SHARD)

    return write


def drop(name: str) -> Callable[[Path], None]:
    return lambda path: edit_header(path / SHARD, lambda header: header.pop(name))


def truncate(path: Path) -> None:
    os.truncate(path / SHARD, (path / SHARD).stat().st_size - 1)


def set_quantization(**values: object) -> Callable[[Path], None]:
    return set_config(quantization_config=QUANTIZATION | values)


def fuse(path: Path) -> None:
    tensors = load_file(path / SHARD)
    fused = {"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(8, 272, 160).to(torch.float8_e4m3fn)}
    save_file(tensors | fused, path / SHARD)


SUPPORTED = ["config.json", "a scale for each block of 128 x 128", '"weight_block_size": [128, 128]']


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (drop(EXPERT + "_scale_inv"), [EXPERT + "_scale_inv [2, 2] is missing"]),
        (drop(QUERY + "_scale_inv"), [QUERY + "_scale_inv [1, 2] is missing"]),
        (drop(EXPERT), [EXPERT + " [160, 136] is missing"]),
        (change(EXPERT + "_scale_inv", lambda s: s[:1]), [SHARD, EXPERT + "_scale_inv has shape [1, 2]", "[2, 2]"]),
        (change(EXPERT + "_scale_inv", lambda s: s.half()), [SHARD, EXPERT + "_scale_inv is F16", "F32, BF16"]),
        (change(EXPERT, lambda w: w[:159]), [SHARD, EXPERT + " has shape [159, 136]", "[160, 136]"]),
        (change(EXPERT, lambda w: w.view(torch.float8_e5m2)), [SHARD, EXPERT + " is F8_E5M2", "F32, F16, BF16"]),
        (change("model.norm.weight", lambda w: w.to(torch.float8_e4m3fn)), [SHARD, "model.norm.weight [160] is F8"]),
        (fuse, [SHARD, "model.layers.0.mlp.experts.gate_up_proj [8, 272, 160] is F8_E4M3", "only matrices"]),
        (truncate, [SHARD, "truncated"]),
        (set_config(quantization_config=None), [SHARD, "is F8_E4M3; supported are F32, F16, BF16"]),
        (set_config(quantization_config=["fp8"]), SUPPORTED),
        (set_config(quantization_config={"quant_method": "fp8"}), [*SUPPORTED, "weight_block_size None"]),
        (set_quantization(quant_method="compressed-tensors"), [*SUPPORTED, "quant_method 'compressed-tensors'"]),
        (set_quantization(quant_method="mxfp4"), [*SUPPORTED, "quant_method 'mxfp4'"]),
        (set_quantization(fmt="e5m2"), [*SUPPORTED, "fmt 'e5m2'"]),
        (set_quantization(weight_block_size=[1, 128]), [*SUPPORTED, "weight_block_size [1, 128]"]),
        (set_quantization(weight_block_size=None), [*SUPPORTED, "weight_block_size None"]),  # per tensor
        (set_quantization(activation_scheme="static"), [*SUPPORTED, "activation_scheme 'static'"]),
        (set_quantization(scale_fmt="ue8m0"), [*SUPPORTED, "scale_fmt 'ue8m0'"]),
        (set_quantization(expert_dtype="fp4"), [*SUPPORTED, "expert_dtype 'fp4'"]),
    ],
)
def test_a_broken_checkpoint_is_one_error_at_open(
    path: Path, damage: Callable[[Path], object], expected: list[str]
) -> None:
    Checkpoint(path).close()
    open_files = len(os.listdir("/proc/self/fd"))
    damage(path)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(path)
    assert [part for part in expected if part not in str(caught.value)] == []
    assert len(os.listdir("/proc/self/fd")) == open_files


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (change(EXPERT, lambda w: poison(w, 0x7F)), f"{SHARD}: tensor {EXPERT} has codes that are not a number"),
        (change(EXPERT, lambda w: poison(w, 0xFF)), f"{SHARD}: tensor {EXPERT} has codes that are not a number"),
        (
            change(EXPERT + "_scale_inv", lambda s: s * torch.inf),
            f"{SHARD}: tensor {EXPERT}_scale_inv has scales that are not finite",
        ),
        (
            change(EXPERT + "_scale_inv", lambda s: s.float() * torch.nan),
            f"{SHARD}: tensor {EXPERT}_scale_inv has scales that are not finite",
        ),
    ],
)
def test_what_is_no_number_is_an_error_of_the_read(path: Path, damage: Callable[[Path], object], expected: str) -> None:
    damage(path)
    checkpoint = Checkpoint(path)
    checkpoint.expert(1, 2)
    with pytest.raises(CheckpointError, match=expected):
        checkpoint.expert(1, 3)


def poison(weight: torch.Tensor, code: int) -> torch.Tensor:
    weight.view(torch.uint8)[-1, -1] = code
    return weight


def test_a_file_truncated_after_opening_names_the_scales(path: Path) -> None:
    """Which are found through the index here, in a file of their own."""
    tensors = load_file(path / SHARD)
    name = EXPERT + "_scale_inv"
    save_file({name: tensors.pop(name)}, path / "scales.safetensors")
    save_file(tensors, path / SHARD)
    weight_map = dict.fromkeys(tensors, SHARD) | {name: "scales.safetensors"}
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = Checkpoint(path)
    checkpoint.expert(1, 3)
    os.truncate(path / "scales.safetensors", 100)
    with pytest.raises(CheckpointError, match=rf"scales\.safetensors: truncated: {name}"):
        checkpoint.expert(1, 3)


@pytest.mark.parametrize("quantization", [None, {}])
def test_without_an_entry_nothing_is_quantised(quantization: Any) -> None:
    assert not is_quantized({"quantization_config": quantization}, "config.json")
    assert is_quantized({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "x")
