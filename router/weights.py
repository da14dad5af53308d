"""The weights outside the experts, by what they are for: one place that knows their names in a checkpoint.

Names are those of Mixtral and Qwen3-MoE in Hugging Face layout, which are the same but for the gate's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernels.tensors import Stored
from moering.checkpoint import Checkpoint
from moering.errors import CheckpointError
from router.model_config import MoEModelConfig

_HEAD = "lm_head.weight"


class Weights:
    """Reads weights, each when it is asked for, and gives them to `convert`: a decoder's type, on its device.

    Methods raise `CheckpointError`, as `Checkpoint.tensor` does.
    """

    def __init__(
        self, checkpoint: Checkpoint, config: MoEModelConfig, convert: Callable[[Stored], torch.Tensor]
    ) -> None:
        self._checkpoint, self._config, self._convert = checkpoint, config, convert

    def embeddings(self) -> torch.Tensor:
        """[vocab, hidden]."""
        return self._read("model.embed_tokens.weight")

    def final_norm(self) -> torch.Tensor:
        """[hidden], of the norm before the head."""
        return self._read("model.norm.weight")

    def head(self, embeddings: torch.Tensor) -> torch.Tensor:
        """[vocab, hidden]; `embeddings` where the checkpoint ties and stores none. A stored one counts, as in
        transformers."""
        if self._config.tied_embeddings and _HEAD not in self._checkpoint.names():
            return embeddings
        head = self._read(_HEAD)
        if head.shape != embeddings.shape:
            raise CheckpointError(f"{self._checkpoint.path}: tensor {_HEAD} has shape {list(head.shape)}")
        return head

    def attention(self, layer: int) -> dict[str, torch.Tensor]:
        """q_proj, k_proj and v_proj [heads * head_dim, hidden], o_proj [hidden, heads * head_dim] and, with head norms,
        q_norm and k_norm [head_dim]."""
        names = ["q_proj", "k_proj", "v_proj", "o_proj", *(("q_norm", "k_norm") if self._config.head_norms else ())]
        return {name: self._read(f"model.layers.{layer}.self_attn.{name}.weight") for name in names}

    def attention_norm(self, layer: int) -> torch.Tensor:
        """[hidden], of the norm before attention."""
        return self._read(f"model.layers.{layer}.input_layernorm.weight")

    def experts_norm(self, layer: int) -> torch.Tensor:
        """[hidden], of the norm before the gate and the experts."""
        return self._read(f"model.layers.{layer}.post_attention_layernorm.weight")

    def gate(self, layer: int) -> torch.Tensor:
        """[experts, hidden]."""
        return self._read(self._checkpoint.gate_name(layer))

    def _read(self, name: str) -> torch.Tensor:
        return self._convert(self._checkpoint.tensor(name))
