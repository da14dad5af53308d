"""The dense Llama inside a GGUF file: its weights as fp16 and the Hugging Face files made from its metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

from moering.upcycle import Half


class GgufSource:
    """A GGUF file of architecture "llama", memory-mapped."""

    def __init__(self, path: Path) -> None:
        reader = GGUFReader(path)
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.num_layers: int = self._field("llama.block_count")
        self.hidden_size: int = self._field("llama.embedding_length")
        self.num_heads: int = self._field("llama.attention.head_count")
        self.num_kv_heads: int = self._field("llama.attention.head_count_kv")

    def load(self, name: str) -> Half:
        """A tensor [out, in] dequantised and rounded to fp16, which is what the default model's weights are."""
        tensor = self._tensors[name]
        return np.asarray(dequantize(tensor.data, tensor.tensor_type).astype(np.float16))

    def mixtral_config(self, num_experts: int, top_k: int) -> dict[str, Any]:
        """`config.json`; each expert has half of the dense model's neurons."""
        tokens = self._field("tokenizer.ggml.tokens")
        return {
            "architectures": ["MixtralForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": self._field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._field("tokenizer.ggml.eos_token_id"),
            "head_dim": self.hidden_size // self.num_heads,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self._field("llama.feed_forward_length") // 2,
            "max_position_embeddings": self._field("llama.context_length"),
            "model_type": "mixtral",
            "num_attention_heads": self.num_heads,
            "num_experts_per_tok": top_k,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "num_local_experts": num_experts,
            "pad_token_id": self._field("tokenizer.ggml.padding_token_id"),
            # The file has it as float32, 9.99999975e-06: six digits give back the number that was meant.
            "rms_norm_eps": float(f"{self._field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
            "rope_theta": float(self._field("llama.rope.freq_base")),
            "sliding_window": None,
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "torch_dtype": "float16",
            "vocab_size": len(tokens),
        }

    def generation_config(self) -> dict[str, Any]:
        """`generation_config.json`: where generation begins and ends."""
        return {
            "bos_token_id": self._field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": [self._field("tokenizer.ggml.eos_token_id")],
            "pad_token_id": self._field("tokenizer.ggml.padding_token_id"),
        }

    def tokenizer_config(self) -> dict[str, Any]:
        """`tokenizer_config.json` with the chat template."""
        tokens = self._field("tokenizer.ggml.tokens")
        names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
        special = {f"{hf}_token": tokens[self._field(f"tokenizer.ggml.{ours}_token_id")] for hf, ours in names.items()}
        return special | {
            "add_prefix_space": False,
            "chat_template": self._field("tokenizer.chat_template"),
            "clean_up_tokenization_spaces": False,
            "model_max_length": self._field("llama.context_length"),
            "tokenizer_class": "PreTrainedTokenizerFast",
        }

    def vocabulary(self) -> tuple[list[str], list[int], list[str]]:
        """Tokens by id, GGUF's type of each, and the merges in order of rank."""
        tokens = self._field("tokenizer.ggml.tokens")
        return tokens, self._field("tokenizer.ggml.token_type"), self._field("tokenizer.ggml.merges")

    def _field(self, name: str) -> Any:
        return self._fields[name].contents()
