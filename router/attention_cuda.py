"""Grouped-query attention with rotary embedding on a GPU, and with head norms where the family has them (Qwen3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kernels.triton_attention import paged_attention
from kernels.triton_linear import Linear
from kernels.triton_rotary import Rotary
from router.attention import rotary_table
from router.buffers_cuda import Scratch, Step
from router.model_config import MoEModelConfig


def rotary_tables(
    config: MoEModelConfig, max_positions: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, each [max_positions, head_dim / 2] float32."""
    turns = rotary_table(config, max_positions)
    return turns.real.contiguous().to(device), turns.imag.contiguous().to(device)


class Attention:
    """One layer's attention, from normed hidden states onto the residual stream."""

    def __init__(
        self, config: MoEModelConfig, weights: Mapping[str, torch.Tensor], tables: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """`weights`, on the device: q_proj, k_proj, v_proj, o_proj and, with head norms, q_norm and k_norm."""
        self._qkv = Linear(torch.cat([weights[name] for name in ("q_proj", "k_proj", "v_proj")]))
        self._o_proj = Linear(weights["o_proj"])
        norms = torch.stack((weights["q_norm"], weights["k_norm"])).float() if config.head_norms else None
        self._rotary = Rotary(*tables, norms, config.rms_norm_eps)

    def __call__(self, step: Step, scratch: Scratch, cache: torch.Tensor) -> None:
        """Add the attention of `scratch.normed` to the step's residual; `cache` is one layer of the KV cache."""
        rows, tables = step.padded, step.buffers.tables
        qkv, query, mixed = scratch.qkv[:rows], scratch.query[:rows], scratch.mixed[:rows]
        self._qkv(scratch.normed[:rows], out=qkv)
        self._rotary(qkv, tables.positions, tables.slots, query, cache)
        paged_attention(query, cache, step.paged, mixed, scratch.decode)
        self._o_proj(mixed.view(rows, -1), out=step.residual, add=True)
