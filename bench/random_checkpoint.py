"""Writes a random checkpoint: ``python -m bench.random_checkpoint DIRECTORY --family qwen3_moe``.

Hugging Face layout, with a tokenizer. All experts are different and weigh as much as the residual stream, so that a row
sent to the wrong expert, or left out, shows in the logits. There is one shard per layer, so that memory holds `jobs`
layers at a time. With ``--dtype fp8`` it is like the hub's fp8 checkpoints: linear layers but gates and head in blocks
of 128 x 128 with bf16 scales, all else bf16.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

from moering.config import option, parse
from moering.errors import ConfigError, MoeringError
from moering.quantization import BLOCK, FP8, scale_name, scale_shape

Maker = Callable[[np.random.Generator], np.ndarray]
Stored = tuple[str, tuple[int, ...], bytes]
"""dtype, shape and payload of a tensor."""
FP8_LARGEST = 448.0
Makers = dict[str, Maker]
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_NAMES = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}


@dataclass(frozen=True)
class Shape:
    """Write a random checkpoint of a mixture-of-experts model."""

    directory: str = option("", "where to write; made if it is not there", positional=True)
    family: str = option("mixtral", "architecture", choices=tuple(_NAMES))
    layers: int = option(8, "layers")
    hidden: int = option(256, "hidden size")
    intermediate: int = option(256, "intermediate size of one expert")
    experts: int = option(16, "experts of a layer")
    top_k: int = option(2, "experts of a token")
    heads: int = option(8, "attention heads")
    kv_heads: int = option(2, "key-value heads")
    head_dim: int = option(64, "size of a head")
    vocab: int = option(1024, "vocabulary, at least 259")
    max_positions: int = option(8192, "context length")
    dtype: str = option("float16", "of all weights; fp8: of most, in blocks", choices=("float16", "bfloat16", "fp8"))
    jobs: int = option(1, "layers made at once")
    seed: int = option(0, "of all weights")

    def __post_init__(self) -> None:
        if not self.directory:
            raise ConfigError("the directory to write is missing")
        if self.vocab < len(SPECIAL) + 256:
            raise ConfigError(f"vocab: {self.vocab} does not hold 256 bytes and {len(SPECIAL)} special tokens")
        if not 1 <= self.top_k <= self.experts or self.heads % self.kv_heads:
            raise ConfigError("top_k must be in 1..experts and heads a multiple of kv_heads")

    def config(self) -> dict[str, Any]:
        """`config.json`."""
        common: dict[str, Any] = {
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.max_positions,
            "model_type": self.family,
            "num_attention_heads": self.heads,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e4,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16" if self.dtype == "fp8" else self.dtype,
            "vocab_size": self.vocab,
        }
        if self.dtype == "fp8":
            quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
            common["quantization_config"] = quantization | {"weight_block_size": [BLOCK, BLOCK]}
        if self.family == "mixtral":
            return common | {"architectures": ["MixtralForCausalLM"], "num_local_experts": self.experts}
        own: dict[str, Any] = {
            "num_experts": self.experts,
            "moe_intermediate_size": self.intermediate,
            "norm_topk_prob": True,
        }
        own |= {"attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []}
        return common | own | {"architectures": ["Qwen3MoeForCausalLM"]}


def write(shape: Shape) -> Path:
    """Write the checkpoint and return its directory. Equal shapes give equal files."""
    directory = Path(shape.directory)
    directory.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    with ThreadPoolExecutor(shape.jobs) as pool:
        shards = pool.map(lambda number: _write_shard(directory, shape, number), range(shape.layers + 1))
        for tensors, name in tqdm(shards, total=shape.layers + 1, unit="shard", file=sys.stderr, disable=None):
            weight_map |= dict.fromkeys(tensors, name)
    _json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    _json(directory / "config.json", shape.config())
    _json(directory / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    _write_tokenizer(directory, shape)
    return directory


def _write_shard(directory: Path, shape: Shape, number: int) -> tuple[list[str], str]:
    """Shard 0 holds what is outside the layers, shard n the layer n - 1. Returns its tensors' names and its own."""
    makers = _outer(shape) if number == 0 else _attention(f"model.layers.{number - 1}", shape)
    if number:
        makers |= _experts(f"model.layers.{number - 1}", shape)
    rng = np.random.default_rng([shape.seed, number])
    file = f"model-{number + 1:05d}-of-{shape.layers + 1:05d}.safetensors"
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    payload = []
    at = 0
    for made, make in makers.items():
        for name, (dtype, sizes, data) in _stored(made, make(rng), shape.dtype).items():
            payload.append(data)
            header[name] = {"dtype": dtype, "shape": list(sizes), "data_offsets": [at, at + len(data)]}
            at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the payload starts aligned
    with (directory / file).open("wb") as f:
        f.writelines([len(text).to_bytes(8, "little"), text, *payload])
    return [name for name in header if name != "__metadata__"], file


def _stored(name: str, values: np.ndarray, dtype: str) -> dict[str, Stored]:
    """The tensor in the file, and with fp8 the one with its scales."""
    if dtype == "float16":
        return {name: ("F16", values.shape, values.astype(np.float16).tobytes())}
    if dtype == "fp8" and (name.endswith("_proj.weight") or ".experts." in name):
        codes, scale = _fp8(values)
        return {name: (FP8, values.shape, codes), scale_name(name): ("BF16", scale.shape, _bf16(scale))}
    return {name: ("BF16", values.shape, _bf16(values))}


def _fp8(values: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Codes, and scales that are bf16 numbers, so that the largest weight of a block becomes the largest code or so."""
    import torch

    weight = torch.from_numpy(values)
    scale = torch.empty(scale_shape(values.shape))
    for row, rows in enumerate(weight.split(BLOCK)):
        for column, block in enumerate(rows.split(BLOCK, dim=1)):
            scale[row, column] = (block.abs().max() / FP8_LARGEST).bfloat16()
            block.div_(scale[row, column]).clamp_(-FP8_LARGEST, FP8_LARGEST)
    return weight.to(torch.float8_e4m3fn).view(torch.uint8).numpy().tobytes(), scale.numpy()


def _bf16(values: np.ndarray) -> bytes:
    return ((values.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16).tobytes()


def _outer(shape: Shape) -> Makers:
    return {
        "model.embed_tokens.weight": lambda rng: rng.standard_normal((shape.vocab, shape.hidden), np.float32),
        "model.norm.weight": _norm(shape.hidden),
        "lm_head.weight": _matrix(shape.vocab, shape.hidden),
    }


def _attention(prefix: str, shape: Shape) -> Makers:
    rows = {
        "q": shape.heads * shape.head_dim,
        "k": shape.kv_heads * shape.head_dim,
        "v": shape.kv_heads * shape.head_dim,
    }
    tensors = {f"{prefix}.self_attn.{name}_proj.weight": _matrix(n, shape.hidden) for name, n in rows.items()}
    tensors[f"{prefix}.self_attn.o_proj.weight"] = _matrix(shape.hidden, rows["q"])
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}.{name}.weight"] = _norm(shape.hidden)
    if shape.family == "qwen3_moe":
        for name in ("q_norm", "k_norm"):
            tensors[f"{prefix}.self_attn.{name}.weight"] = _norm(shape.head_dim)
    return tensors


def _experts(prefix: str, shape: Shape) -> Makers:
    block, (gate, up, down) = _NAMES[shape.family]
    tensors = {f"{prefix}.{block}.gate.weight": _matrix(shape.experts, shape.hidden, 2)}
    for expert in range(shape.experts):
        for name in (gate, up, down):
            rows, columns = shape.intermediate, shape.hidden
            if name == down:
                rows, columns = columns, rows
            tensors[f"{prefix}.{block}.experts.{expert}.{name}.weight"] = _matrix(rows, columns, 2)
    return tensors


def _matrix(rows: int, columns: int, scale: float = 1) -> Maker:
    """Multiplies the scale of what it is applied to by `scale`."""
    factor = np.float32(scale / np.sqrt(columns))
    return lambda rng: rng.standard_normal((rows, columns), np.float32) * factor


def _norm(size: int) -> Maker:
    return lambda rng: np.asarray(1 + 0.1 * rng.standard_normal(size, np.float32), np.float32)


def _write_tokenizer(directory: Path, shape: Shape) -> None:
    """One token per byte; the rest of the vocabulary are words that no text becomes, only samples."""
    entries = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    entries += [f"<{i}>" for i in range(len(entries), shape.vocab)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(entries)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "chat_template": TEMPLATE}
    settings |= {"model_max_length": shape.max_positions, "tokenizer_class": "PreTrainedTokenizerFast"}
    _json(directory / "tokenizer_config.json", settings)


def _json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Write the checkpoint and print its directory."""
    try:
        print(write(parse(Shape, sys.argv[1:] if argv is None else argv, prog="python -m bench.random_checkpoint")))
    except MoeringError as e:
        print(f"bench.random_checkpoint: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
