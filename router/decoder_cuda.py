"""The decoder of the Mixtral and Qwen3-MoE families on a GPU, split at each MoE layer; bf16 weights, fp32 residual.

The same steps and the same promise as `router.decoder`: a row's bits depend on its sequence's tokens alone. Everything
between two expert layers is one *segment*: experts' outputs into the residual, norm, attention, norm, gate. It begins
with a read of the outputs where servers put them (`router.expert_rows_cuda`), and ends with the experts' ids and inputs
on the host. Segments of decode steps run as CUDA graphs, their row counts padded to those of `GRAPH_ROWS`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from triton import next_power_of_2

from kernels.graphs import Graphs
from kernels.tensors import Stored, as_tensor
from kernels.triton_attention import SPLIT_KEYS, prefill_tile_rows
from kernels.triton_combine import add_combined_at
from kernels.triton_gate import choose_experts
from kernels.triton_linear import Linear
from kernels.triton_rms_norm import rms_norm
from moering.checkpoint import Checkpoint
from router.attention_cuda import Attention, rotary_tables
from router.attention_plan import SequenceChunk
from router.buffers_cuda import COMPUTE_DTYPE, Buffers, Limits, Scratch, Step
from router.expert_rows_cuda import DeviceRows
from router.kv_cache_cuda import KVCache
from router.micro_batch_cuda import MicroBatch
from router.model_config import MoEModelConfig
from router.weights import Weights

GRAPH_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
WARM_UP_ROWS = (1, 2, 20, 40, 70, 600)  # at least one for each tiling of the linear layers


class _Layer:
    """The weights of one layer outside its experts."""

    def __init__(
        self, weights: Weights, config: MoEModelConfig, index: int, tables: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        self.attention = Attention(config, weights.attention(index), tables)
        self.attention_norm = weights.attention_norm(index).float()
        self.experts_norm = weights.experts_norm(index).float()
        self.gate = Linear(weights.gate(index))


class Decoder:
    """All of the model but its experts. Not thread-safe; micro-batches may be in flight side by side."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        kv_cache: KVCache,
        max_rows: int,
        max_sequences: int,
        max_model_len: int,
        device: torch.device | str = "cuda",
        graph_rows: tuple[int, ...] = GRAPH_ROWS,
    ) -> None:
        """Read the weights outside the experts. A step has up to `max_rows` rows, of up to `max_sequences` sequences of
        up to `max_model_len` tokens.

        Raise `CheckpointError` for an unsupported configuration.
        """
        self.config = config = MoEModelConfig.from_checkpoint(checkpoint)
        self.device = torch.device(device)
        self.numerics = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "interpreted"
        self._cache, self._graph_rows = kv_cache, graph_rows
        weights = Weights(checkpoint, config, self._on_device)
        length = min(max_model_len, config.max_positions, kv_cache.num_blocks * kv_cache.block_size)
        tables = rotary_tables(config, length, self.device)
        self._embeddings = weights.embeddings()
        self._layers = [_Layer(weights, config, index, tables) for index in range(config.num_layers)]
        self._final_norm = weights.final_norm().float()
        self._head = Linear(weights.head(self._embeddings))
        self._max_rows = max_rows
        self._limits = Limits(
            rows=max(max_rows, *graph_rows),
            decode_rows=max(max_sequences, *graph_rows),
            pages=-(-length // kv_cache.block_size),
            splits=next_power_of_2(-(-length // SPLIT_KEYS)),
        )
        self._tile_rows = prefill_tile_rows(config.num_heads, config.num_kv_heads)
        self._scratch = Scratch(config, self._limits, self.device)
        self._idle: list[Buffers] = []
        self._graphs = Graphs(self.device)

    def _on_device(self, stored: Stored) -> torch.Tensor:
        return as_tensor(stored).to(self.device, COMPUTE_DTYPE)

    def start(self, token_ids: list[int], chunks: Sequence[SequenceChunk]) -> MicroBatch:
        """A micro-batch before its first layer. `token_ids` are those of all chunks, one chunk after the other."""
        config, rows = self.config, len(token_ids)
        if rows == 0 or rows != sum(c.length for c in chunks):
            raise ValueError(f"{rows} tokens do not match chunks of {[c.length for c in chunks]}")
        if rows > self._max_rows or len(chunks) > self._limits.decode_rows:
            raise ValueError(f"{rows} rows in one step; this decoder is built for {self._max_rows}")
        padded = rows
        if rows == len(chunks):
            padded = min((n for n in self._graph_rows if n >= rows), default=rows)
        buffers = self._idle.pop() if self._idle else Buffers(config, self._limits, self._tile_rows, self.device)
        buffers.tables.fill(token_ids, chunks, padded, self._cache.spare_page)
        splits = next_power_of_2(buffers.tables.splits)  # few shapes, so few graphs
        step = Step(buffers, padded, buffers.tables.paged_rows(padded, splits))
        pairs = rows * config.top_k
        addresses = buffers.host_addresses[: padded * config.top_k]
        expert_rows = DeviceRows(buffers.host_inputs[:rows], buffers.outputs[:pairs], addresses)
        mb = MicroBatch(step, rows, buffers.host_ids[:rows], expert_rows)
        weakref.finalize(mb, self._idle.append, buffers)
        return mb

    def launch(self, mb: MicroBatch) -> torch.cuda.Event | None:
        """Begin what leads up to the gate of layer `mb.layer`. When the event has come (None: now) the experts' inputs
        and `topk_ids` are there, and the outputs of the layer before have been read."""
        self._run_segment(mb.step, mb.layer)
        reached = mb.step.buffers.reached
        if reached is not None:
            reached.record()
        return reached

    def until_experts(self, mb: MicroBatch) -> None:
        """`launch`, and wait for it."""
        reached = self.launch(mb)
        if reached is not None:
            reached.synchronize()
        mb.device_rows.begin_layer()

    def after_experts(self, mb: MicroBatch) -> None:
        """The outputs of the layer's experts are there; the next segment reads them."""
        mb.layer += 1

    def logits(self, mb: MicroBatch, rows: list[int]) -> torch.Tensor:
        """Logits [len(rows), vocab] float32, on the device, of the given rows, after the last layer."""
        if not mb.landed:
            self._combine(mb.step)
            mb.landed = True
        logits = self._logits(mb.step, rows)
        self._wait()  # what the outputs lie in is free after this
        return logits

    def _logits(self, step: Step, rows: list[int]) -> torch.Tensor:
        chosen = step.residual.index_select(0, torch.tensor(rows, device=self.device))
        normed = self._scratch.normed[: len(rows)]
        rms_norm(chosen, self._final_norm, self.config.rms_norm_eps, out=normed)
        return self._head(normed, out=torch.empty(len(rows), self._head.columns, device=self.device))

    def warm_up(self) -> None:
        """Compile and load what steps of any size need, so that no request waits for it. Writes the spare page only."""
        spare = self._cache.spare_page
        with torch.inference_mode():
            for rows in (n for n in WARM_UP_ROWS if n <= self._max_rows):
                for length in (1, rows) if rows <= self._limits.decode_rows else (rows,):
                    chunk = SequenceChunk([spare] * -(-length // self._cache.block_size), 0, length)
                    mb = self.start([0] * rows, [chunk] * (rows // length))
                    self.until_experts(mb)
                    self.logits(mb, [0])

    # --- segments ---

    def _run_segment(self, step: Step, layer: int) -> None:
        def body() -> None:
            if layer:
                self._combine(step)
            self._segment(step, layer)
            self._fetch_choice(step)

        if step.padded in self._graph_rows and not step.paged.tiles.shape[0]:
            self._graphs.run((id(step.buffers), step.padded, step.paged.splits, layer), body)
        else:
            body()

    def _fetch_choice(self, step: Step) -> None:
        """The experts' inputs, and what the gate chose, to the host."""
        buffers, rows = step.buffers, step.padded
        buffers.host_inputs[:rows].copy_(step.inputs, non_blocking=True)
        buffers.host_ids[:rows].copy_(self._scratch.ids[:rows], non_blocking=True)

    def _combine(self, step: Step) -> None:
        """Experts' outputs, weighted, onto the residual."""
        pairs = step.padded * self.config.top_k
        addresses = step.buffers.addresses[:pairs].copy_(step.buffers.host_addresses[:pairs], non_blocking=True)
        add_combined_at(step.residual, addresses, step.topk_weights)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def _segment(self, step: Step, layer_index: int) -> None:
        """Attention and gate of a layer."""
        layer, scratch, eps, rows = self._layers[layer_index], self._scratch, self.config.rms_norm_eps, step.padded
        normed, scores = scratch.normed[:rows], scratch.scores[:rows]
        if layer_index == 0:
            torch.index_select(self._embeddings, 0, step.buffers.tables.token_ids[:rows], out=normed)
            step.residual.copy_(normed)
        rms_norm(step.residual, layer.attention_norm, eps, out=normed)
        layer.attention(step, scratch, self._cache.layers[layer_index])
        rms_norm(step.residual, layer.experts_norm, eps, out=step.inputs)
        layer.gate(step.inputs, out=scores)
        live, local_ids = step.buffers.tables.live, scratch.local_ids[:rows]
        choose_experts(scores, live, scratch.ids[:rows], local_ids, step.topk_weights, self.config.normalize_topk)
