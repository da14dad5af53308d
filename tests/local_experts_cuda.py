"""Experts on the router's own GPU: the baseline that the distributed path is compared with."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch

from expert_server.formats_cuda import format_of
from expert_server.slots_cuda import Slots
from moering.checkpoint import Checkpoint
from router.micro_batch_cuda import MicroBatch

LOAD_THREADS = 4  # what takes long is hashing


class LocalExperts:
    """All experts of a checkpoint in GPU memory, in the format that expert servers keep them in."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str = "cuda") -> None:
        self._device = torch.device(device)
        with ThreadPoolExecutor(LOAD_THREADS) as pool:
            self.layers = [self._load_layer(checkpoint, layer, pool) for layer in range(checkpoint.num_layers)]

    @torch.inference_mode()
    def run(self, mb: MicroBatch) -> None:
        """Put the outputs of the micro-batch's current layer in place, by way of the host as in a cluster."""
        ids = mb.topk_ids.to(self._device, torch.int32).flatten()
        out = self.layers[mb.layer].forward(mb.step.inputs[: mb.rows], ids, top_k=mb.topk_ids.shape[1])
        mb.device_rows.put(np.arange(len(ids)), out.view(torch.int16).cpu().numpy())

    def _load_layer(self, checkpoint: Checkpoint, layer: int, pool: ThreadPoolExecutor) -> Any:
        weight_format, experts = format_of(checkpoint), range(checkpoint.num_experts)
        slots = Slots(weight_format, len(experts), self._device)
        loaded = [slots.load(weights) for weights in pool.map(partial(checkpoint.expert, layer), experts)]
        assert [expert.slot for expert in loaded] == list(experts)
        return weight_format.kernels(slots.parts)
