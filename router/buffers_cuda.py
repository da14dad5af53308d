"""The memory that micro-batches use on their way through a GPU: all of it allotted at the start.

`Scratch` holds what lives within one segment: one set, since segments run one after the other on one stream. `Buffers`
holds what a micro-batch keeps between segments, on the device and, pinned, on the host: one set for each in flight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.triton_attention import DecodeScratch, PagedRows
from router.attention_plan_cuda import RowTables
from router.model_config import MoEModelConfig

COMPUTE_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Limits:
    """What a step can hold at most."""

    rows: int
    decode_rows: int
    pages: int  # of one sequence
    splits: int  # of one sequence


class Scratch:
    """Intermediate results of one segment."""

    def __init__(self, config: MoEModelConfig, limits: Limits, device: torch.device) -> None:
        rows, hidden, top_k, c = limits.rows, config.hidden_size, config.top_k, config
        self.normed = torch.zeros(rows, hidden, dtype=COMPUTE_DTYPE, device=device)
        self.qkv = torch.zeros(rows, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim, device=device)
        self.query = torch.zeros(rows, c.num_heads, c.head_dim, dtype=COMPUTE_DTYPE, device=device)
        self.mixed = torch.zeros_like(self.query)
        self.scores = torch.zeros(rows, c.num_experts, device=device)
        self.local_ids = torch.zeros(rows, top_k, dtype=torch.int32, device=device)
        self.ids = torch.zeros(rows, top_k, dtype=torch.int64, device=device)
        self.decode = DecodeScratch.empty(limits.decode_rows, limits.splits, c.num_heads, c.head_dim, device)


class Buffers:
    """What one micro-batch keeps between segments. `addresses` says where each output of an expert is, `outputs` or
    elsewhere; `host_inputs` are what servers are sent; `reached` marks the end of the last segment that was begun."""

    def __init__(self, config: MoEModelConfig, limits: Limits, tile_rows: int, device: torch.device) -> None:
        rows, pinned = limits.rows, device.type == "cuda"
        self.residual = torch.zeros(rows, config.hidden_size, device=device)
        self.topk_weights = torch.zeros(rows, config.top_k, device=device)
        self.tables = RowTables(rows, limits.pages, tile_rows, device)
        self.inputs = torch.zeros(rows, config.hidden_size, dtype=COMPUTE_DTYPE, device=device)
        self.outputs = torch.zeros(rows * config.top_k, config.hidden_size, dtype=COMPUTE_DTYPE, device=device)
        self.addresses = torch.zeros(rows * config.top_k, dtype=torch.int64, device=device)
        self.host_addresses = torch.zeros(rows * config.top_k, dtype=torch.int64, pin_memory=pinned)
        self.host_inputs = torch.zeros(rows, config.hidden_size, dtype=COMPUTE_DTYPE, pin_memory=pinned)
        self.host_ids = torch.zeros(rows, config.top_k, dtype=torch.int64, pin_memory=pinned)
        self.reached = torch.cuda.Event() if pinned else None


@dataclass(frozen=True)
class Step:
    """One micro-batch as segments see it; equal for two micro-batches of one shape, so graphs may hold it."""

    buffers: Buffers
    padded: int  # rows computed
    paged: PagedRows

    @property
    def residual(self) -> torch.Tensor:
        """float32 [padded, hidden]."""
        return self.buffers.residual[: self.padded]

    @property
    def topk_weights(self) -> torch.Tensor:
        """float32 [padded, k]."""
        return self.buffers.topk_weights[: self.padded]

    @property
    def inputs(self) -> torch.Tensor:
        """bf16 [padded, hidden]: of the layer's experts."""
        return self.buffers.inputs[: self.padded]
