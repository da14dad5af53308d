"""Experts on the router's own GPU: the baseline that the distributed path is compared with."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from kernels.tensors import as_tensor
from kernels.triton_expert_ffn import GroupedExperts
from moering.checkpoint import Checkpoint
from router.micro_batch_cuda import MicroBatch

LOAD_THREADS = 4  # what takes long is hashing


class LocalExperts:
    """All experts of a checkpoint in GPU memory, bf16."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str = "cuda") -> None:
        self._device = torch.device(device)
        with ThreadPoolExecutor(LOAD_THREADS) as pool:
            layers = range(checkpoint.num_layers)
            self.layers = list(pool.map(lambda layer: _load_layer(checkpoint, layer, self._device), layers))

    @torch.inference_mode()
    def run(self, mb: MicroBatch) -> None:
        """Put the outputs of the micro-batch's current layer in place, by way of the host as in a cluster."""
        ids = mb.topk_ids.to(self._device, torch.int32).flatten()
        out = self.layers[mb.layer].forward(mb.step.inputs[: mb.rows], ids, top_k=mb.topk_ids.shape[1])
        mb.device_rows.put(np.arange(len(ids)), out.view(torch.int16).cpu().numpy())


def _load_layer(checkpoint: Checkpoint, layer: int, device: torch.device) -> GroupedExperts:
    c = checkpoint
    hidden, inter = c.hidden_size, c.moe_intermediate_size
    w13 = torch.empty(c.num_experts, 2 * inter, hidden, dtype=torch.bfloat16, device=device)
    w2 = torch.empty(c.num_experts, hidden, inter, dtype=torch.bfloat16, device=device)
    for expert in range(c.num_experts):
        weights = c.expert(layer, expert)
        for target, raw in zip((w13[expert, :inter], w13[expert, inter:], w2[expert]), weights.parts, strict=True):
            target.copy_(as_tensor(raw))
    return GroupedExperts(w13, w2)
