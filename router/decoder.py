"""The decoder of the Mixtral and Qwen3-MoE families, split at each MoE layer.

`start`, then per layer `launch` (or `until_experts`) and `after_experts`, then `logits`. Between the two the engine has
the experts computed elsewhere. A row's bits depend on its sequence's tokens alone: not on the batch, the chunks or the
threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from kernels.expert_ffn import numerics_fingerprint
from kernels.linear import Backend, PackedLinear
from kernels.rms_norm import RMSNorm, new_stream
from kernels.tensors import as_packable
from moering.checkpoint import Checkpoint
from router.attention import Attention, rotary_table
from router.attention_plan import AttentionPlan, SequenceChunk, plan_attention
from router.gate import Gate
from router.kv_cache import KVCache
from router.micro_batch import MicroBatch
from router.model_config import MoEModelConfig
from router.weights import Weights


class Launched(Protocol):
    """Work of a GPU that is under way; a `torch.cuda.Event`."""

    def query(self) -> bool:
        """Whether it is done."""
        ...

    def synchronize(self) -> None:
        """Wait until it is."""
        ...


@dataclass(eq=False, kw_only=True)
class PlannedMicroBatch(MicroBatch):
    """With what attention needs; `residual` has the columns of `kernels.rms_norm.new_stream`."""

    attention: AttentionPlan
    rotation: torch.Tensor  # complex64 [n, 1, head_dim / 2]


class _Layer:
    """The weights of one layer outside its experts."""

    def __init__(self, weights: Weights, config: MoEModelConfig, index: int, backend: Backend) -> None:
        self.attention = Attention(config, weights.attention(index), backend)
        self.attention_norm = RMSNorm(weights.attention_norm(index), config.rms_norm_eps)
        self.experts_norm = RMSNorm(weights.experts_norm(index), config.rms_norm_eps)
        self.gate = Gate(weights.gate(index), config, backend)


class Decoder:
    """All of the model but its experts. Not thread-safe; micro-batches may be in flight side by side.

    Call it under `torch.inference_mode()`, entered once by the thread: at one row, entering it per call costs time.
    """

    def __init__(self, checkpoint: Checkpoint, kv_cache: KVCache, backend: Backend = "auto") -> None:
        """Read the weights outside the experts; raise `CheckpointError` for an unsupported configuration."""
        self.config = config = MoEModelConfig.from_checkpoint(checkpoint)
        self.numerics = f"pytorch {numerics_fingerprint(backend)}"
        self._cache = kv_cache
        weights = Weights(checkpoint, config, as_packable)
        self._embeddings = weights.embeddings()
        self._layers = [_Layer(weights, config, index, backend) for index in range(config.num_layers)]
        self._final_norm = RMSNorm(weights.final_norm(), config.rms_norm_eps)
        self._head = PackedLinear(weights.head(self._embeddings), backend)
        capacity = kv_cache.num_blocks * kv_cache.block_size
        self._rotary = rotary_table(config, min(config.max_positions, capacity))

    def start(self, token_ids: list[int], chunks: Sequence[SequenceChunk]) -> PlannedMicroBatch:
        """A micro-batch before its first layer. `token_ids` are those of all chunks, one chunk after the other."""
        config, rows = self.config, len(token_ids)
        positions = positions_of(token_ids, chunks)
        ids = torch.tensor(token_ids)
        embedded = self._embeddings.index_select(0, ids).float()
        return PlannedMicroBatch(
            token_ids=ids,
            positions=positions,
            chunks=list(chunks),
            attention=plan_attention(chunks, config.head_dim),
            rotation=self._rotary.index_select(0, positions).unsqueeze(1),
            residual=new_stream(embedded, config.rms_norm_eps),
            expert_input=torch.empty_like(embedded),
            expert_output=torch.empty(rows, config.top_k, config.hidden_size),
            topk_ids=torch.empty(rows, config.top_k, dtype=torch.int64),
            topk_weights=torch.empty(rows, config.top_k),
        )

    def launch(self, mb: PlannedMicroBatch) -> Launched | None:
        """`until_experts`; on a CPU nothing is under way after it."""
        self.until_experts(mb)
        return None

    def until_experts(self, mb: PlannedMicroBatch) -> None:
        """Attention and gate of layer `mb.layer`: fills `expert_input`, `topk_ids` and `topk_weights`."""
        layer, cache = self._layers[mb.layer], self._cache.layers[mb.layer]
        normed = layer.attention_norm.of_stream(mb.residual, out=mb.expert_input)
        gained = layer.attention(normed, mb.rotation, mb.attention, cache)
        mb.residual.narrow(1, 0, self.config.hidden_size).add_(gained)
        layer.experts_norm.of_stream(mb.residual, out=mb.expert_input)
        layer.gate(mb.expert_input, mb.topk_ids, mb.topk_weights)

    def after_experts(self, mb: PlannedMicroBatch) -> None:
        """Add the weighted expert outputs to the residual stream, in top-k order, and go to the next layer."""
        stream = mb.residual.narrow(1, 0, self.config.hidden_size)
        for j in range(self.config.top_k):
            stream.addcmul_(mb.expert_output.select(1, j), mb.topk_weights.narrow(1, j, 1))
        mb.layer += 1

    def logits(self, mb: PlannedMicroBatch, rows: list[int]) -> torch.Tensor:
        """Logits [len(rows), vocab] float32 of the given rows, after the last layer."""
        chosen = mb.residual.index_select(0, torch.tensor(rows))
        normed = torch.empty(len(rows), self.config.hidden_size)
        return self._head(self._final_norm.of_stream(chosen, out=normed))


def positions_of(token_ids: list[int], chunks: Sequence[SequenceChunk]) -> torch.Tensor:
    """int64 [n]: the position of each token, those of all chunks one after the other. `ValueError`: not as many."""
    positions = torch.tensor([p for c in chunks for p in range(c.start, c.start + c.length)])
    if not token_ids or len(positions) != len(token_ids):
        raise ValueError(f"{len(token_ids)} tokens do not match chunks of {[c.length for c in chunks]}")
    return positions
