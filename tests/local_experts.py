"""Experts in the router's own process: the baseline that the distributed path is compared with."""

from __future__ import annotations

import torch

from kernels.expert_ffn import ExpertFFN, grouped_expert_ffn
from kernels.linear import Backend
from kernels.tensors import as_packable
from moering.checkpoint import Checkpoint
from router.micro_batch import MicroBatch


class LocalExperts:
    """All experts of a checkpoint; computes what an engine would dispatch."""

    def __init__(self, checkpoint: Checkpoint, backend: Backend = "auto") -> None:
        self._layers = [
            [_load_expert(checkpoint, layer, expert, backend) for expert in range(checkpoint.num_experts)]
            for layer in range(checkpoint.num_layers)
        ]

    @torch.inference_mode()
    def run(self, mb: MicroBatch) -> None:
        """Fill `mb.expert_output` for the micro-batch's current layer."""
        experts = self._layers[mb.layer]
        pairs, order = mb.topk_ids.flatten().sort(stable=True)
        counts = torch.bincount(pairs, minlength=len(experts)).tolist()
        out = torch.empty(order.shape[0], mb.expert_input.shape[1])
        grouped_expert_ffn(mb.expert_input, order // mb.topk_ids.shape[1], counts, experts, out)
        mb.expert_output.view(out.shape).index_copy_(0, order, out)


def _load_expert(checkpoint: Checkpoint, layer: int, expert: int, backend: Backend) -> ExpertFFN:
    gate, up, down = map(as_packable, checkpoint.expert(layer, expert).parts)
    return ExpertFFN(gate, up, down, backend)
