"""Grouped-query attention with rotary embedding, and with head norms where the family has them (Qwen3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.attention import QUERY_MULTIPLE, attend
from kernels.linear import Backend, PackedLinear
from kernels.rms_norm import RMSNorm
from kernels.threads import PARALLEL_ELEMENTS, one_thread
from router.attention_plan import AttentionPlan, DecodeCall, KeyView, PrefillCall
from router.model_config import MoEModelConfig


def angles(config: MoEModelConfig, max_positions: int) -> torch.Tensor:
    """float64 [max_positions, head_dim / 2]: by what each pair of a head is turned at each position.

    Computed in fp32 as in the reference; as fp64, so that the bits of sine and cosine depend on the angle alone.
    """
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    return (torch.arange(max_positions).float()[:, None] * (1.0 / config.rope_theta**exponents)).double()


def rotary_table(config: MoEModelConfig, max_positions: int) -> torch.Tensor:
    """complex64 [max_positions, head_dim / 2]: what each pair of a head is multiplied by at each position."""
    turns = angles(config, max_positions)
    return torch.complex(turns.cos().float(), turns.sin().float())


def pair_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder each head's rows from (0, …, d-1) to (0, d/2, 1, d/2+1, …).

    The rotary embedding turns (i, i + d/2); as neighbours they are one complex number, and the whole embedding one
    product. Queries and keys are reordered alike, so their scores stay what they were.
    """
    rows, *rest = weight.shape
    return weight.view(heads, 2, rows // heads // 2, *rest).transpose(1, 2).reshape(weight.shape)


class Attention:
    """One layer's attention, from normed hidden states to what the residual stream gains."""

    def __init__(self, config: MoEModelConfig, weights: dict[str, torch.Tensor], backend: Backend) -> None:
        """`weights`: q_proj, k_proj, v_proj, o_proj and, with head norms, q_norm and k_norm."""
        self._kv_heads, self._dim = config.num_kv_heads, config.head_dim
        self._group = config.num_heads // config.num_kv_heads
        query, key = pair_rows(weights["q_proj"], config.num_heads), pair_rows(weights["k_proj"], config.num_kv_heads)
        self._queries_end = config.num_heads * config.head_dim
        self._kv_width = 2 * config.num_kv_heads * config.head_dim
        self._keys_end = self._queries_end + self._kv_width // 2
        # rows that the last group may borrow to have 4 (see _decode), where keys and values are too few
        spare = max(0, QUERY_MULTIPLE - self._group - 2 * self._kv_heads) * self._dim
        fused = F.pad(torch.cat((query, key, weights["v_proj"])), (0, 0, 0, spare))
        self._qkv = PackedLinear(fused, backend)
        self._o_proj = PackedLinear(weights["o_proj"], backend)
        self._head_norm: RMSNorm | None = None
        if config.head_norms:
            query_norm, key_norm = pair_rows(weights["q_norm"], 1), pair_rows(weights["k_norm"], 1)
            scales = torch.cat((query_norm.expand(config.num_heads, -1), key_norm.expand(self._kv_heads, -1)))
            self._head_norm = RMSNorm(scales, config.rms_norm_eps)

    def __call__(
        self, x: torch.Tensor, rotation: torch.Tensor, plan: AttentionPlan, cache: torch.Tensor
    ) -> torch.Tensor:
        """x [n, hidden] → [n, hidden]; writes the rows' keys and values to `cache`, one layer of the KV cache.

        `rotation` is complex [n, 1, head_dim / 2].
        """
        qkv = self._qkv(x)
        turning = qkv.narrow(1, 0, self._keys_end).view(x.shape[0], -1, self._dim)
        if self._head_norm is not None:
            self._head_norm(turning, out=turning)
        _rotate(turning, rotation)
        cache.view(cache.shape[0], -1).index_copy_(0, plan.slots, qkv.narrow(1, self._queries_end, self._kv_width))
        return self._o_proj(self._mix(plan, qkv, cache))

    def _mix(self, plan: AttentionPlan, qkv: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        """Every row's attention over its keys: [n, heads * head_dim]."""
        rows = qkv.shape[0]
        if len(plan.decodes) == 1 and plan.order is None and not plan.prefills:
            return self._decode(plan.decodes[0], qkv, cache).reshape(rows, self._queries_end)
        out = torch.empty(rows, self._kv_heads, self._group, self._dim)
        if plan.order is None:
            for call in plan.decodes:
                out[call.lo : call.hi] = self._decode(call, qkv, cache)
        else:
            ordered, mixed = qkv.index_select(0, plan.order), torch.empty(len(plan.order), *out.shape[1:])
            for call in plan.decodes:
                mixed[call.lo : call.hi] = self._decode(call, ordered, cache)
            out.index_copy_(0, plan.order, mixed)
        for chunk in plan.prefills:
            out[chunk.lo : chunk.hi] = self._prefill(chunk, qkv, cache)
        return out.view(rows, self._queries_end)

    def _decode(self, call: DecodeCall, qkv: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        """[count, kv_heads, group, dim]. A group's heads are the query rows, so a key is read once for all of them.

        A group of under 4 borrows the heads behind it in memory as rows that it needs and drops.
        """
        width, dim, group = qkv.shape[1], self._dim, self._group
        shape = (call.keys.count, self._kv_heads, max(group, QUERY_MULTIPLE), dim)
        query = qkv.as_strided(shape, (width, group * dim, dim, 1), qkv.storage_offset() + call.lo * width)
        key, value = keys_values(cache, call.keys)
        return attend(query, key, value, call.mask).narrow(2, 0, group)

    def _prefill(self, call: PrefillCall, qkv: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        """[rows, kv_heads, group, dim]. The kv heads are the batch and their groups the heads: no key is repeated."""
        rows, dim, group = call.hi - call.lo, self._dim, self._group
        query = qkv[call.lo : call.hi, : self._queries_end]
        if call.padded > rows:
            query = F.pad(query, (0, 0, 0, call.padded - rows))
        query = query.view(call.padded, self._kv_heads, group, dim).permute(1, 2, 0, 3)
        key, value = (t.transpose(0, 1).expand(-1, group, -1, -1) for t in keys_values(cache, call.keys))
        return attend(query, key, value, call.mask)[:, :, :rows].permute(2, 0, 1, 3)


def _rotate(heads: torch.Tensor, rotation: torch.Tensor) -> None:
    """Apply the rotary embedding to `heads` [n, heads, dim] in place."""
    pairs = torch.view_as_complex(heads.view(*heads.shape[:2], -1, 2))
    if pairs.numel() < PARALLEL_ELEMENTS:
        pairs.mul_(rotation)
    else:
        with one_thread():  # threads would cut heads into pieces whose ends are computed in another way
            pairs.mul_(rotation)


def keys_values(cache: torch.Tensor, keys: KeyView) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, each [count, kv_heads, length, head_dim], views unless the blocks must be gathered."""
    slot, _, head, element = cache.stride()
    _, _, kv_heads, dim = cache.shape
    first = keys.first
    if keys.slots is not None:
        cache, first = cache.index_select(0, keys.slots), 0
    shape, strides = (keys.count, kv_heads, keys.length, dim), (keys.step * slot, head, slot, element)
    offset = first * slot
    return cache.as_strided(shape, strides, offset), cache.as_strided(shape, strides, offset + kv_heads * dim)
