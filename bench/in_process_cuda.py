"""The decoder of `bench.in_process --device cuda`: experts on the router's own GPU, and a whole step as one graph."""

from __future__ import annotations

import torch

from kernels.triton_combine import add_combined
from moering.checkpoint import Checkpoint
from router.buffers_cuda import Step
from router.decoder_cuda import Decoder
from router.kv_cache_cuda import KVCache
from router.micro_batch_cuda import MicroBatch
from tests.local_experts_cuda import LocalExperts


class WholeDecoder(Decoder):
    """`launch` goes through all layers at once; the engine finds the last one done."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        kv_cache: KVCache,
        max_rows: int,
        max_sequences: int,
        max_model_len: int,
        device: str = "cuda",
    ) -> None:
        super().__init__(checkpoint, kv_cache, max_rows, max_sequences, max_model_len, device)
        self._experts = LocalExperts(checkpoint, self.device).layers
        rows = self._limits.rows * self.config.top_k
        self._outputs = torch.zeros(rows, self.config.hidden_size, dtype=torch.bfloat16, device=self.device)

    def launch(self, mb: MicroBatch) -> None:
        """All layers, and their experts; nobody has to wait for them before `logits`."""
        step = mb.step

        def body() -> None:
            for layer in range(self.config.num_layers):
                self._segment(step, layer)
                self._run_experts(step, layer)

        if step.padded in self._graph_rows and not step.paged.tiles.shape[0]:
            self._graphs.run((id(step.buffers), step.padded, step.paged.splits), body)
        else:
            body()
        mb.layer = self.config.num_layers - 1

    def logits(self, mb: MicroBatch, rows: list[int]) -> torch.Tensor:
        """See `Decoder.logits`; the experts' outputs are in the residual already."""
        return self._logits(mb.step, rows)

    def _run_experts(self, step: Step, layer: int) -> None:
        pairs = step.padded * self.config.top_k
        x, ids = step.inputs, self._scratch.local_ids[: step.padded].view(-1)
        self._experts[layer].forward(x, ids, top_k=self.config.top_k, out=self._outputs[:pairs])
        add_combined(step.residual, self._outputs[:pairs], step.topk_weights)
