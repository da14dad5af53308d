"""Tiny random checkpoints in Hugging Face layout, so that no test needs a download.

Experts are distinct and scaled so that they matter: without them the logits move by more than a tenth of their maximum.
"""

import json
import math
import string
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
EOS_ID = 2
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
Tensors = dict[str, np.ndarray]


def write_checkpoint(
    path: str | Path,
    family: str = "mixtral",
    *,
    layers: int = 2,
    hidden: int = 64,
    intermediate: int = 96,
    experts: int = 8,
    top_k: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    vocab: int = 320,
    seed: int = 0,
    shards: int = 2,
    fused: bool = False,
    dtype: str = "F16",
    max_positions: int = 4096,
    hot: bool = False,
    config: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint of `family` ("mixtral" or "qwen3_moe") into the directory `path`, and return it.

    `fused` writes the 3-D expert tensors of transformers 5, `dtype` is F16, BF16 or F32, `config` overrides entries
    of `config.json`. With `hot` every token chooses expert 0 of every layer. Equal arguments give equal files.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    tensors = _dense_tensors(rng, family, layers, hidden, heads * head_dim, kv_heads * head_dim, head_dim, vocab)
    if hot:
        tensors["model.embed_tokens.weight"] += 3  # what all tokens have in common, and expert 0 looks for
    for layer in range(layers):
        gate_up = rng.standard_normal((experts, 2 * intermediate, hidden)) * 2 / np.sqrt(hidden)
        down = rng.standard_normal((experts, hidden, intermediate)) * 2 / np.sqrt(intermediate)
        gate = rng.standard_normal((experts, hidden)) * 2 / np.sqrt(hidden)
        if hot:
            gate -= gate.mean(axis=1, keepdims=True)
            gate[0] = 3
        tensors |= _expert_tensors(family, f"model.layers.{layer}", fused, gate_up, down, gate)
    _write_shards(path, tensors, shards, dtype)
    _write_tokenizer(path, vocab)
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}} if fused else {"rope_theta": 1e4}
    content = _family_config(family, experts, intermediate) | rope
    content |= {
        "bos_token_id": 1,
        "eos_token_id": EOS_ID,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "max_position_embeddings": max_positions,
        "num_attention_heads": heads,
        "num_experts_per_tok": top_k,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": _DTYPES[dtype],
        "vocab_size": vocab,
    }
    _write_json(path / "config.json", content | (config or {}))
    _write_json(path / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [EOS_ID]})
    return path


def _family_config(family: str, experts: int, intermediate: int) -> dict[str, Any]:
    if family == "mixtral":
        return {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "intermediate_size": intermediate,
            "num_local_experts": experts,
        }
    assert family == "qwen3_moe", family
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "intermediate_size": 3 * intermediate,
        "mlp_only_layers": [],
        "moe_intermediate_size": intermediate,
        "norm_topk_prob": True,
        "num_experts": experts,
    }


def _dense_tensors(
    rng: np.random.Generator,
    family: str,
    layers: int,
    hidden: int,
    q_rows: int,
    kv_rows: int,
    head_dim: int,
    vocab: int,
) -> Tensors:
    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.normal(0, 1 / math.sqrt(columns), (rows, columns))

    def norm(size: int) -> np.ndarray:
        return np.asarray(1 + 0.1 * rng.standard_normal(size))

    tensors = {
        "model.embed_tokens.weight": rng.standard_normal((vocab, hidden)),
        "model.norm.weight": norm(hidden),
        "lm_head.weight": matrix(vocab, hidden),
    }
    for prefix in (f"model.layers.{layer}" for layer in range(layers)):
        tensors[f"{prefix}.input_layernorm.weight"] = norm(hidden)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = norm(hidden)
        tensors[f"{prefix}.self_attn.q_proj.weight"] = matrix(q_rows, hidden)
        tensors[f"{prefix}.self_attn.k_proj.weight"] = matrix(kv_rows, hidden)
        tensors[f"{prefix}.self_attn.v_proj.weight"] = matrix(kv_rows, hidden)
        tensors[f"{prefix}.self_attn.o_proj.weight"] = matrix(hidden, q_rows)
        if family == "qwen3_moe":
            tensors[f"{prefix}.self_attn.q_norm.weight"] = norm(head_dim)
            tensors[f"{prefix}.self_attn.k_norm.weight"] = norm(head_dim)
    return tensors


def _expert_tensors(
    family: str, prefix: str, fused: bool, gate_up: np.ndarray, down: np.ndarray, gate: np.ndarray
) -> Tensors:
    """gate_up [experts, 2 * intermediate, hidden], down [experts, hidden, intermediate], gate [experts, hidden]."""
    if fused:
        return {
            f"{prefix}.mlp.gate.weight": gate,
            f"{prefix}.mlp.experts.gate_up_proj": gate_up,
            f"{prefix}.mlp.experts.down_proj": down,
        }
    block, names = ("block_sparse_moe", ("w1", "w3", "w2")) if family == "mixtral" else ("mlp", _QWEN_NAMES)
    tensors = {f"{prefix}.{block}.gate.weight": gate}
    for expert, (expert_gate_up, expert_down) in enumerate(zip(gate_up, down, strict=True)):
        parts = (*np.split(expert_gate_up, 2), expert_down)
        for name, part in zip(names, parts, strict=True):
            tensors[f"{prefix}.{block}.experts.{expert}.{name}.weight"] = part
    return tensors


_QWEN_NAMES = ("gate_proj", "up_proj", "down_proj")


def _write_shards(path: Path, tensors: Tensors, shards: int, dtype: str) -> None:
    names = sorted(tensors)
    parts = [names[i * len(names) // shards : (i + 1) * len(names) // shards] for i in range(shards)]
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    if shards == 1:
        files = ["model.safetensors"]
    else:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        _write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    for file, part in zip(files, parts, strict=True):
        write_safetensors(path / file, {n: (dtype, tensors[n].shape, _to_bytes(tensors[n], dtype)) for n in part})


def write_safetensors(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    """Write (dtype, shape, payload) by name; our own because the library's numpy half cannot write BF16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the payload starts aligned
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for *_, data in tensors.values()))


def _to_bytes(values: np.ndarray, dtype: str) -> bytes:
    if dtype != "BF16":
        return values.astype(_DTYPES[dtype]).tobytes()
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()  # numpy has no bfloat16


def _write_tokenizer(path: Path, vocab: int) -> None:
    """Byte-level BPE: the special tokens, 256 bytes, then pairs of letters and digits up to `vocab` entries."""
    entries = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    letters = string.ascii_letters + string.digits
    pairs = [(a, b) for a in letters for b in letters][: vocab - len(entries)]
    entries += [a + b for a, b in pairs]
    assert len(entries) == vocab, f"the tiny tokenizer has {len(entries)} entries at most, at least 259; not {vocab}"
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(entries)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(path / "tokenizer.json"))
    _write_json(
        path / "tokenizer_config.json",
        {
            "bos_token": SPECIAL_TOKENS[1],
            "chat_template": CHAT_TEMPLATE,
            "eos_token": SPECIAL_TOKENS[EOS_ID],
            "model_max_length": 4096,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
