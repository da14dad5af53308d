"""Between the QKV product and attention on a GPU: head norms, rotary embedding, and keys and values into the cache.

One program per (row, head). Halves (i, i + d/2) of a head turn together, as in the checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@triton.jit
def _rotary_kernel(
    qkv_ptr, query_ptr, cache_ptr, slots_ptr, positions_ptr, cos_ptr, sin_ptr, norm_ptr, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    i = tl.arange(0, HALF)
    x_ptr = qkv_ptr + (row * (HEADS + 2 * KV_HEADS) + head) * DIM + i
    low = tl.load(x_ptr).to(tl.float32)
    high = tl.load(x_ptr + HALF).to(tl.float32)
    if head < HEADS + KV_HEADS:
        if NORM:
            scale = tl.rsqrt(tl.sum(low * low + high * high, axis=0) / DIM + eps)
            weight_ptr = norm_ptr + tl.where(head < HEADS, 0, DIM) + i
            low = low * scale * tl.load(weight_ptr)
            high = high * scale * tl.load(weight_ptr + HALF)
        angle = tl.load(positions_ptr + row).to(tl.int64) * HALF + i
        cos = tl.load(cos_ptr + angle)
        sin = tl.load(sin_ptr + angle)
        turned = low * cos - high * sin
        high = high * cos + low * sin
        low = turned
    if head < HEADS:
        out_ptr = query_ptr + (row * HEADS + head) * DIM + i
    else:
        slot = tl.load(slots_ptr + row).to(tl.int64)
        part = head - HEADS  # keys of all heads, then values of all heads
        out_ptr = cache_ptr + ((slot // PAGE * 2 * KV_HEADS + part) * PAGE + slot % PAGE) * DIM + i
    tl.store(out_ptr, low.to(query_ptr.dtype.element_ty))
    tl.store(out_ptr + HALF, high.to(query_ptr.dtype.element_ty))


@dataclass(frozen=True)
class Rotary:
    """What turns and norms the heads of one layer.

    cos, sin: [positions, head_dim / 2] float32.  norms: [2, head_dim] float32, of query and of key heads, or None.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    norms: torch.Tensor | None
    eps: float

    def __call__(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        query: torch.Tensor,
        cache: torch.Tensor,
    ) -> None:
        """Write turned queries to `query`, turned keys and the values to `cache`.

        qkv: [n, heads + 2 * kv_heads, head_dim], queries, keys, values; positions and slots: [n] int32; query:
        [n, heads, head_dim]; cache: [pages, 2, kv_heads, page, head_dim]; a slot is page number * page + place.
        """
        rows, heads, dim = query.shape
        _, _, kv_heads, page, _ = cache.shape
        if qkv.numel() != rows * (heads + 2 * kv_heads) * dim or not (qkv.is_contiguous() and query.is_contiguous()):
            raise ValueError(f"qkv {tuple(qkv.shape)} and query {tuple(query.shape)} do not belong together")
        norms = self.cos if self.norms is None else self.norms
        _rotary_kernel[(rows, heads + 2 * kv_heads)](
            qkv, query, cache, slots, positions, self.cos, self.sin, norms, self.eps,
            HEADS=heads, KV_HEADS=kv_heads, DIM=dim, HALF=dim // 2, PAGE=page, NORM=self.norms is not None,
            num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
