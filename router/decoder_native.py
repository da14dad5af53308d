"""`router.decoder` with one call of `kernels._native` for all that lies between two layers' experts.

On a CPU the arithmetic of a few rows takes less time than the calls that ask PyTorch for it, one by one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels import native_decoder as native
from kernels.expert_ffn import numerics_fingerprint
from kernels.linear import native_linear
from kernels.tensors import as_packable
from moering.checkpoint import Checkpoint
from router.attention import angles
from router.attention_plan import SequenceChunk
from router.decoder import Launched, positions_of
from router.kv_cache import KVCache
from router.micro_batch import MicroBatch
from router.model_config import MoEModelConfig
from router.weights import Weights


@dataclass(eq=False, kw_only=True)
class NativeMicroBatch(MicroBatch):
    """With the addresses of all that a layer reads and writes, and the memory behind them."""

    addresses: native.Batch
    memory: tuple[torch.Tensor, ...]


class _Layer:
    """The weights of one layer outside its experts."""

    def __init__(self, weights: Weights, config: MoEModelConfig, index: int, cache: torch.Tensor) -> None:
        attention = weights.attention(index)
        products = {
            "qkv": torch.cat([attention[name] for name in ("q_proj", "k_proj", "v_proj")]),
            "o_proj": attention["o_proj"],
            "gate": weights.gate(index),
        }
        norms = {
            "attention_norm": weights.attention_norm(index).float(),
            "experts_norm": weights.experts_norm(index).float(),
        }
        if config.head_norms:
            norms |= {"query_norm": attention["q_norm"].float(), "key_norm": attention["k_norm"].float()}
        packed = {name: native_linear(weight) for name, weight in products.items()}
        self.cache, self._memory = cache, (packed, norms)
        self._layer = native.Layer(
            cache=cache.data_ptr(),
            **{name: product.weight for name, product in packed.items()},
            **{name: norm.data_ptr() for name, norm in norms.items()},
        )
        self.address = ctypes.addressof(self._layer)


class Decoder:
    """All of the model but its experts. Not thread-safe; micro-batches may be in flight side by side."""

    def __init__(self, checkpoint: Checkpoint, kv_cache: KVCache) -> None:
        """Read the weights outside the experts; raise `CheckpointError` for an unsupported configuration."""
        self.config = config = MoEModelConfig.from_checkpoint(checkpoint)
        self.numerics = f"native {numerics_fingerprint('native')}"
        weights = Weights(checkpoint, config, as_packable)
        self._embeddings = weights.embeddings()
        self._layers = [_Layer(weights, config, i, kv_cache.layers[i]) for i in range(config.num_layers)]
        self._final_norm = weights.final_norm().float()
        self._head = native_linear(weights.head(self._embeddings))
        turns = angles(config, min(config.max_positions, kv_cache.num_blocks * kv_cache.block_size))
        self._cosines, self._sines = turns.cos().float(), turns.sin().float()
        self._model = native.Model(
            *(config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim),
            *(config.num_experts, config.top_k, config.normalize_topk),
            *(self._cosines.data_ptr(), self._sines.data_ptr(), config.rms_norm_eps),
        )
        self._address, self._num_blocks = ctypes.addressof(self._model), kv_cache.num_blocks
        self._together = max(1, native.QUERIES_TOGETHER // (config.num_heads // config.num_kv_heads))

    def start(self, token_ids: list[int], chunks: Sequence[SequenceChunk]) -> NativeMicroBatch:
        """A micro-batch before its first layer. `token_ids` are those of all chunks, one chunk after the other."""
        config, rows = self.config, len(token_ids)
        positions = positions_of(token_ids, chunks)
        for c in chunks:  # nothing beyond this looks
            most, end = min(len(self._cosines), native.BLOCK * len(c.block_table)), c.start + c.length
            if end > most or not 0 <= min(c.block_table) <= max(c.block_table) < self._num_blocks:
                raise ValueError(f"positions up to {end} in the blocks {c.block_table} of {self._num_blocks}")
        blocks = [torch.tensor(chunk.block_table) for chunk in chunks]
        tables = torch.tensor([b.data_ptr() for b, c in zip(blocks, chunks, strict=True) for _ in range(c.length)])
        starts, first = [0], 0
        for chunk in chunks:
            starts += range(first + self._together, first + chunk.length, self._together)
            first += chunk.length
            starts.append(first)
        group_starts = torch.tensor(starts)
        ids = torch.tensor(token_ids)
        residual = self._embeddings.index_select(0, ids).float()
        expert_input = torch.empty_like(residual)
        topk_ids = torch.empty(rows, config.top_k, dtype=torch.int64)
        topk_weights = torch.empty(rows, config.top_k)
        attended = config.num_heads * config.head_dim
        width = max(attended + 2 * config.num_kv_heads * config.head_dim, config.hidden_size)
        room = [torch.empty(rows, columns) for columns in (width, attended, config.num_experts)]
        arrays = (positions, tables, group_starts, residual, expert_input, topk_ids, topk_weights, *room)
        return NativeMicroBatch(
            token_ids=ids,
            positions=positions,
            chunks=list(chunks),
            residual=residual,
            expert_input=expert_input,
            expert_output=torch.empty(rows, config.top_k, config.hidden_size),
            topk_ids=topk_ids,
            topk_weights=topk_weights,
            addresses=native.Batch(rows, len(starts) - 1, *(array.data_ptr() for array in arrays)),
            memory=(*arrays, *blocks),
        )

    def launch(self, mb: NativeMicroBatch) -> Launched | None:
        """`until_experts`; on a CPU nothing is under way after it."""
        self.until_experts(mb)
        return None

    def until_experts(self, mb: NativeMicroBatch) -> None:
        """Attention and gate of layer `mb.layer`: fills `expert_input`, `topk_ids` and `topk_weights`."""
        layer, batch = self._layers[mb.layer].address, ctypes.addressof(mb.addresses)
        native.until_experts(self._address, layer, batch, torch.get_num_threads())

    def after_experts(self, mb: NativeMicroBatch) -> None:
        """Add the weighted expert outputs to the residual stream, in top-k order, and go to the next layer."""
        native.after_experts(self._address, ctypes.addressof(mb.addresses), mb.expert_output.data_ptr())
        mb.layer += 1

    def logits(self, mb: NativeMicroBatch, rows: list[int]) -> torch.Tensor:
        """Logits [len(rows), vocab] float32 of the given rows, after the last layer."""
        chosen = mb.residual.index_select(0, torch.tensor(rows))
        address, size = chosen.data_ptr(), self.config.hidden_size
        native.rms_norm(address, self._final_norm.data_ptr(), self.config.rms_norm_eps, len(rows), size, address)
        return self._head(chosen)
