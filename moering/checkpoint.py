"""A checkpoint in Hugging Face layout, read by byte range and never whole.

Opening it parses `config.json`, the index and the shards' headers and checks every tensor that serving needs, without
reading payload: what is missing or has the wrong shape is one `CheckpointError` before a process announces itself.
Experts are found in the per-expert layouts of both families and in the fused one that transformers 5 can write; fp8
ones, which are read together with their scales (`moering.quantization`), in the per-expert layouts.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from moering.checkpoint_layout import Layout, parse_layout
from moering.errors import CheckpointError
from moering.quantization import FP8, SCALE_DTYPES, SCALE_SUFFIX, check_values, scale_name, scale_shape
from moering.safetensors_shard import RawTensor, Shard, TensorSlice

__all__ = ["Checkpoint", "ExpertWeights", "RawTensor"]

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
WEIGHT_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class ExpertWeights:
    """One expert: gate and up projection [intermediate, hidden], down projection [hidden, intermediate].

    `digest` is 8 bytes of SHA-256 over the three payloads in this order, an fp8 one followed by its scales; it does not
    depend on the file layout. Of the hashes in the standard library it is the fastest on processors with instructions
    for it.
    """

    gate_proj: RawTensor
    up_proj: RawTensor
    down_proj: RawTensor
    digest: bytes

    @property
    def parts(self) -> tuple[RawTensor, RawTensor, RawTensor]:
        """Gate, up, down."""
        return self.gate_proj, self.up_proj, self.down_proj


@dataclass(frozen=True)
class _Weight:
    """Where a tensor lies, and the scales of a quantised one."""

    tensor: TensorSlice
    scale: TensorSlice | None = None

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes + (self.scale.nbytes if self.scale else 0)

    def packed_nbytes(self, row_multiple: int) -> int:
        """See `Checkpoint.packed_expert_bytes`."""
        columns = self.tensor.shape[-1]
        nbytes = self.tensor.nbytes // columns * -(-columns // row_multiple) * row_multiple
        return 2 * nbytes if self.scale else nbytes

    def read(self) -> RawTensor:
        weight = self.tensor.read()
        if self.scale is None:
            return weight
        scale = self.scale.read()
        check_values(weight, scale, self.tensor.name, str(self.tensor.shard.path))
        return replace(weight, scale=scale)


class Checkpoint:
    """An open checkpoint directory. Threads may read from it at the same time."""

    def __init__(self, path: str | Path) -> None:
        """Open and check the directory; raise `CheckpointError` naming file and tensor."""
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: no such checkpoint directory")
        hasher = hashlib.sha256()
        self.config = _read_json(self.path / "config.json", hasher)
        self.layout: Layout = parse_layout(self.config, str(self.path / "config.json"))
        self.num_layers = self.layout.num_layers
        self.num_experts = self.layout.num_experts
        self.hidden_size = self.layout.hidden_size
        self.moe_intermediate_size = self.layout.moe_intermediate_size
        self.top_k = self.layout.top_k
        self._shards: dict[str, Shard] = {}
        self._read_lock = threading.Lock()
        self.bytes_read = 0  # payload only, headers are not counted
        try:
            self._tensors = self._open_shards(hasher)
            self._gate_names = self._check_dense()
            self._experts = {
                (layer, expert): parts
                for layer in range(self.num_layers)
                for expert, parts in enumerate(self._find_experts(layer))
            }
        except CheckpointError:
            self.close()
            raise
        self.digest = hasher.hexdigest()
        experts = self._experts.values()
        self.expert_bytes = max(sum(part.nbytes for part in parts) for parts in experts)
        self.expert_dtypes = {part.tensor.dtype for parts in experts for part in parts}

    def packed_expert_bytes(self, row_multiple: int) -> int:
        """Of the largest expert as a CPU computes with it: fp8 becomes fp16, and each weight's rows are filled up to a
        multiple of so many values."""
        return max(sum(part.packed_nbytes(row_multiple) for part in parts) for parts in self._experts.values())

    def close(self) -> None:
        """Close the shards."""
        for shard in self._shards.values():
            shard.close()

    def names(self) -> list[str]:
        """All tensors that are not an expert's, sorted; scales belong to their tensors."""
        return sorted(name for name in self._tensors if not _is_expert(name) and not name.endswith(SCALE_SUFFIX))

    def gate_name(self, layer: int) -> str:
        """The name of a layer's gate weight [experts, hidden]; it differs between layouts of one family."""
        return self._gate_names[layer]

    def tensor(self, name: str) -> RawTensor:
        """Read one tensor that is not an expert's."""
        if name not in self._tensors or _is_expert(name):
            raise CheckpointError(f"{self.path}: no tensor {name} outside the experts")
        return self._read(self._with_scale(self._tensors[name]))

    def expert(self, layer: int, expert: int) -> ExpertWeights:
        """Read one expert's weights, and nothing else."""
        if (layer, expert) not in self._experts:
            raise CheckpointError(f"{self.path}: no expert {expert} in layer {layer}")
        gate, up, down = (self._read(part) for part in self._experts[layer, expert])
        digest = hashlib.sha256()
        for part in (gate, up, down):
            digest.update(part.data.data)
            if part.scale is not None:
                digest.update(part.scale.data.data)
        return ExpertWeights(gate, up, down, digest.digest()[:8])

    def _read(self, part: _Weight) -> RawTensor:
        tensor = part.read()
        with self._read_lock:
            self.bytes_read += part.nbytes
        return tensor

    def _open_shards(self, hasher: hashlib._Hash) -> dict[str, TensorSlice]:
        """Open all shards, feed their headers to `hasher`, and return the tensors by name."""
        index_path = self.path / INDEX_NAME
        weight_map: dict[str, str] | None = None
        if index_path.exists():
            weight_map = _weight_map(_read_json(index_path, hasher), index_path)
        elif not (self.path / SINGLE_NAME).exists():
            raise CheckpointError(f"{self.path}: neither {INDEX_NAME} nor {SINGLE_NAME} is there")
        files = [SINGLE_NAME] if weight_map is None else sorted(set(weight_map.values()))
        for file in files:
            self._shards[file] = shard = Shard(self.path / file)
            hasher.update(f"{file} {shard.size} {len(shard.header)}\n".encode())
            hasher.update(shard.header)
        if weight_map is None:
            return self._shards[SINGLE_NAME].tensors
        for name, file in weight_map.items():
            if name not in self._shards[file].tensors:
                raise CheckpointError(f"{self.path / file}: tensor {name} is missing, though the index has it here")
        return {name: self._shards[file].tensors[name] for name, file in weight_map.items()}

    def _check_dense(self) -> list[str]:
        """Check the tensors outside the experts; return the name of each layer's gate."""
        for name, shape in self.layout.dense_shapes():
            self._expect(name, shape)
        gates = []
        for layer in range(self.num_layers):
            names = self.layout.gate_names(layer)
            gates.append(next((name for name in names if name in self._tensors), names[0]))
            self._expect(gates[-1], (self.num_experts, self.hidden_size))
        return gates

    def _find_experts(self, layer: int) -> list[tuple[_Weight, _Weight, _Weight]]:
        """Gate, up and down projection of every expert of a layer."""
        experts, hidden, inter = self.num_experts, self.hidden_size, self.moe_intermediate_size
        gate_up_name, down_name = self.layout.fused_names(layer)
        if gate_up_name in self._tensors:
            gate_up = self._expect(gate_up_name, (experts, 2 * inter, hidden)).tensor
            gate_up = gate_up.reshape(experts * 2 * inter, hidden)
            down = self._expect(down_name, (experts, hidden, inter)).tensor.reshape(experts * hidden, inter)
            return [
                (
                    _Weight(gate_up.rows(2 * e * inter, (2 * e + 1) * inter)),
                    _Weight(gate_up.rows((2 * e + 1) * inter, (2 * e + 2) * inter)),
                    _Weight(down.rows(e * hidden, (e + 1) * hidden)),
                )
                for e in range(experts)
            ]
        found = []
        for expert in range(experts):
            gate, up, down_proj = self.layout.expert_names(layer, expert)
            shape = (inter, hidden)
            found.append((self._expect(gate, shape), self._expect(up, shape), self._expect(down_proj, (hidden, inter))))
        return found

    def _expect(self, name: str, shape: tuple[int, ...]) -> _Weight:
        tensor = self._find(name, shape)
        if self.layout.quantized and tensor.dtype == FP8:
            if len(shape) != 2:
                raise CheckpointError(
                    f"{tensor.shard.path}: tensor {name} {list(shape)} is {FP8}; only matrices may be, one for each "
                    "projection of an expert"
                )
            return self._with_scale(tensor)
        return _Weight(_check_dtype(tensor, WEIGHT_DTYPES))

    def _with_scale(self, tensor: TensorSlice) -> _Weight:
        if tensor.dtype != FP8:
            return _Weight(tensor)
        scale = self._find(scale_name(tensor.name), scale_shape(tensor.shape))
        return _Weight(tensor, _check_dtype(scale, SCALE_DTYPES))

    def _find(self, name: str, shape: tuple[int, ...]) -> TensorSlice:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.path}: tensor {name} {list(shape)} is missing")
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.shard.path}: tensor {name} has shape {list(tensor.shape)}, config.json asks for {list(shape)}"
            )
        return tensor


def _check_dtype(tensor: TensorSlice, dtypes: tuple[str, ...]) -> TensorSlice:
    if tensor.dtype not in dtypes:
        raise CheckpointError(
            f"{tensor.shard.path}: tensor {tensor.name} is {tensor.dtype}; supported are {', '.join(dtypes)}"
        )
    return tensor


def _is_expert(name: str) -> bool:
    return ".experts." in name


def _read_json(path: Path, hasher: hashlib._Hash) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as e:
        raise CheckpointError(f"{path}: cannot read it: {e.strerror}") from e
    hasher.update(f"{path.name} {len(content)}\n".encode())
    hasher.update(content)
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not JSON: {e}") from e
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return parsed


def _weight_map(index: dict[str, Any], index_path: Path) -> dict[str, str]:
    """The index's map of tensor → file. No name may leave the directory; links may, the hub's cache is made of them."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path}: no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or not file.isprintable():  # no NUL, no lone surrogate
            raise CheckpointError(f"{index_path}: tensor {name}: {file!r} is not a file name")
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise CheckpointError(f"{index_path}: tensor {name}: the path {file!r} leaves the directory")
    return weight_map
