"""Tiny checkpoints in block-scaled fp8, made of plain ones as the hub's are, and back: what their weights stand for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"],
}
LARGEST = 448.0
SUFFIX = "_scale_inv"


def quantize(source: Path, target: Path, scale_dtype: torch.dtype = torch.bfloat16, powers: bool = False) -> Path:
    """Write `source` with all linear layers but gates and head in fp8. With `powers` all scales are powers of two, so
    that the weights are bf16 numbers."""
    tensors = {}
    for name, value in _read(source).items():
        if name.endswith("_proj.weight") or ".experts." in name:
            tensors[name], tensors[name + SUFFIX] = _quantized(value.float(), scale_dtype, powers)
        else:
            tensors[name] = value.bfloat16()
    return _write(source, target, tensors, {"quantization_config": QUANTIZATION})


def widen(source: Path, target: Path, dtype: torch.dtype) -> Path:
    """Write the fp8 checkpoint `source` as a plain one."""
    tensors = _read(source)
    plain = {}
    for name, value in tensors.items():
        if name + SUFFIX in tensors:
            plain[name] = (value.float() * _spread(tensors[name + SUFFIX].float(), value)).to(dtype)
        elif not name.endswith(SUFFIX):
            plain[name] = value
    return _write(source, target, plain, {"quantization_config": None})


def _quantized(value: torch.Tensor, scale_dtype: torch.dtype, powers: bool) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = value.shape
    blocks = F.pad(value, (0, -columns % 128, 0, -rows % 128)).unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
    scale = blocks.abs().amax((1, 3)) / LARGEST
    scale = (torch.exp2(scale.log2().ceil()) if powers else scale).to(scale_dtype)
    codes = (value / _spread(scale.float(), value)).clamp(-LARGEST, LARGEST)
    return codes.to(torch.float8_e4m3fn), scale


def _spread(scale: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: like.shape[0], : like.shape[1]]


def _read(path: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in path.glob("*.safetensors") for name, value in load_file(file).items()}


def _write(source: Path, target: Path, tensors: dict[str, torch.Tensor], config: dict[str, object]) -> Path:
    target.mkdir(parents=True)
    for file in source.glob("*.json"):
        if file.name != "model.safetensors.index.json":
            shutil.copy(file, target)
    save_file({name: value.contiguous() for name, value in tensors.items()}, target / "model.safetensors")
    content = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(content | config))
    return target
