"""A dense Llama in GGUF becomes a mixture of experts in Hugging Face layout that computes the same function.

Each of the pairs of experts (0, 1), (2, 3), … is another split of a layer's intermediate neurons into two halves. The
two gate rows of a pair are equal, so top-2 always picks a whole pair, with weights 1/2 and 1/2; `down_proj` is doubled,
hence every pair alone gives the dense layer's output. All randomness comes from SHAKE-256 and not from numpy, whose
generators may change between versions: the same wheel gives the same bytes everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

Array = npt.NDArray[Any]
Half = npt.NDArray[np.float16]

CONTROL_TOKEN = 3  # GGUF's token type of special tokens


def gate_rows(seed: int, num_experts: int, hidden_size: int) -> Half:
    """The gate's weight [experts, hidden]: rows 2p and 2p + 1 are equal, entries are multiples of 2^-6 within ±2."""
    pairs = num_experts // 2
    raw = hashlib.shake_256(f"moering gate {seed}".encode()).digest(pairs * hidden_size)
    rows = np.frombuffer(raw, dtype=np.int8).reshape(pairs, hidden_size).astype(np.float32) / 64
    return np.repeat(rows, 2, axis=0).astype(np.float16)


def split_neurons(layer: int, pair: int, intermediate_size: int) -> tuple[Array, Array]:
    """Two sorted halves of range(intermediate_size), other ones for each (layer, pair)."""
    raw = hashlib.shake_256(f"moering split {layer} {pair}".encode()).digest(8 * intermediate_size)
    order = np.argsort(np.frombuffer(raw, dtype="<u8"), kind="stable")
    half = intermediate_size // 2
    return np.sort(order[:half]), np.sort(order[half:])


def unpermute_rope(weight: Array, num_heads: int) -> Array:
    """Rows of a q or k projection in Hugging Face's order (two halves per head) from GGUF's (interleaved pairs)."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def expert_tensors(layer: int, gate: Half, up: Half, down: Half, num_experts: int) -> dict[str, Half]:
    """The experts of one layer by their Mixtral names.

    `gate` and `up` are the dense layer's [intermediate, hidden], `down` its [hidden, intermediate].
    """
    tensors = {}
    for pair in range(num_experts // 2):
        for side, neurons in enumerate(split_neurons(layer, pair, gate.shape[0])):
            prefix = f"model.layers.{layer}.block_sparse_moe.experts.{2 * pair + side}"
            tensors[f"{prefix}.w1.weight"] = gate[neurons]
            tensors[f"{prefix}.w3.weight"] = up[neurons]
            tensors[f"{prefix}.w2.weight"] = np.ascontiguousarray(2 * down[:, neurons])
    return tensors


def dense_tensors(load: Callable[[str], Half], num_layers: int, num_heads: int, num_kv_heads: int) -> dict[str, Half]:
    """Everything but experts and gates under its Hugging Face name; `load` returns a GGUF tensor as fp16."""
    tensors = {"model.embed_tokens.weight": load("token_embd.weight"), "model.norm.weight": load("output_norm.weight")}
    for layer in range(num_layers):
        prefix, source = f"model.layers.{layer}", f"blk.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = load(f"{source}.attn_norm.weight")
        tensors[f"{prefix}.post_attention_layernorm.weight"] = load(f"{source}.ffn_norm.weight")
        q, k = load(f"{source}.attn_q.weight"), load(f"{source}.attn_k.weight")
        tensors[f"{prefix}.self_attn.q_proj.weight"] = unpermute_rope(q, num_heads)
        tensors[f"{prefix}.self_attn.k_proj.weight"] = unpermute_rope(k, num_kv_heads)
        tensors[f"{prefix}.self_attn.v_proj.weight"] = load(f"{source}.attn_v.weight")
        tensors[f"{prefix}.self_attn.o_proj.weight"] = load(f"{source}.attn_output.weight")
    return tensors


def tokenizer_json(tokens: Sequence[str], token_types: Sequence[int], merges: Sequence[str]) -> str:
    """`tokenizer.json` of a GGUF vocabulary; pre-tokenizer "smollm": single digits, then GPT-2's byte-level BPE."""
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, token_types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return str(tokenizer.to_str(pretty=False))
