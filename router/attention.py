"""Grouped-query attention with rotary embedding, and with head norms where the family has them (Qwen3)."""

from __future__ import annotations

import torch

from kernels.attention import QUERY_MULTIPLE, attend
from kernels.linear import Backend, PackedLinear
from kernels.rms_norm import RMSNorm
from router.attention_plan import AttentionPlan, KeyView
from router.model_config import MoEModelConfig


def rotary_table(config: MoEModelConfig, max_positions: int) -> torch.Tensor:
    """complex64 [max_positions, head_dim / 2]: what each pair of a head is multiplied by at each position.

    Angles in fp32 as in the reference; sine and cosine go through fp64, so that their bits depend on the angle alone.
    """
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    angles = torch.arange(max_positions).float()[:, None] * (1.0 / config.rope_theta**exponents)
    return torch.complex(angles.double().cos().float(), angles.double().sin().float())


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
        self._heads, self._kv_heads, self._dim = config.num_heads, config.num_kv_heads, config.head_dim
        self._group = config.num_heads // config.num_kv_heads
        query, key = pair_rows(weights["q_proj"], config.num_heads), pair_rows(weights["k_proj"], config.num_kv_heads)
        self._qkv = PackedLinear(torch.cat((query, key, weights["v_proj"])), backend)
        self._o_proj = PackedLinear(weights["o_proj"], backend)
        self._head_norm: RMSNorm | None = None
        if config.head_norms:
            query_norm, key_norm = pair_rows(weights["q_norm"], 1), pair_rows(weights["k_norm"], 1)
            scales = torch.cat((query_norm.expand(self._heads, -1), key_norm.expand(self._kv_heads, -1)))
            self._head_norm = RMSNorm(scales, config.rms_norm_eps)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return self._qkv.nbytes + self._o_proj.nbytes

    def new_queries(self, rows: int) -> torch.Tensor:
        """The buffer for a step's queries: zeros [rows + 3, kv_heads, group ≥ 4, head_dim].

        A group is padded to the 4 query rows that a decode call needs; 3 more rows pad the last prefill chunk.
        """
        return torch.zeros(rows + QUERY_MULTIPLE - 1, self._kv_heads, max(self._group, QUERY_MULTIPLE), self._dim)

    def __call__(
        self, x: torch.Tensor, rotation: torch.Tensor, plan: AttentionPlan, queries: torch.Tensor, cache: torch.Tensor
    ) -> torch.Tensor:
        """x [n, hidden] → [n, hidden]; writes the rows' keys and values to `cache`.

        `rotation` is complex [n, 1, head_dim / 2], `queries` from `new_queries(n)`, `cache` one layer of the KV cache.
        """
        rows, heads, kv_heads, dim = x.shape[0], self._heads, self._kv_heads, self._dim
        qkv = self._qkv(x)
        qk = qkv.narrow(1, 0, (heads + kv_heads) * dim).view(rows, heads + kv_heads, dim)
        if self._head_norm is not None:
            self._head_norm(qk, out=qk)
        pairs = torch.view_as_complex(qk.view(rows, heads + kv_heads, dim // 2, 2))
        query_pairs = pairs.narrow(1, 0, heads).view(rows, kv_heads, self._group, dim // 2)
        turned = torch.view_as_complex(queries.view(*queries.shape[:-1], dim // 2, 2))
        torch.mul(query_pairs, rotation.unsqueeze(1), out=turned[:rows, :, : self._group])
        pairs.narrow(1, heads, kv_heads).mul_(rotation)
        cache.view(cache.shape[0], -1).index_copy_(0, plan.slots, qkv.narrow(1, heads * dim, 2 * kv_heads * dim))
        return self._o_proj(self._mix(plan, queries, cache, rows))

    def _mix(self, plan: AttentionPlan, queries: torch.Tensor, cache: torch.Tensor, rows: int) -> torch.Tensor:
        """Every row's attention over its keys: [n, heads * head_dim]."""
        group, whole = self._group, (rows, self._heads * self._dim)
        if len(plan.decodes) == 1 and plan.order is None and not plan.prefills:
            return self._decode(queries[:rows], plan.decodes[0].keys, plan.decodes[0].mask, cache).reshape(whole)
        out = torch.empty(rows, self._kv_heads, group, self._dim)
        if plan.decodes:
            count = plan.decodes[-1].hi
            ordered = queries if plan.order is None else queries.index_select(0, plan.order)
            mixed = out if plan.order is None else torch.empty(count, self._kv_heads, group, self._dim)
            for call in plan.decodes:
                mixed[call.lo : call.hi] = self._decode(ordered[call.lo : call.hi], call.keys, call.mask, cache)
            if plan.order is not None:
                out.index_copy_(0, plan.order, mixed)
        for chunk in plan.prefills:
            # kv heads as the batch, their group as the heads: each key is read once per group, never repeated
            query = queries[chunk.lo : chunk.lo + chunk.padded, :, :group].permute(1, 2, 0, 3)
            key, value = (t.permute(2, 0, 1, 3).expand(-1, group, -1, -1) for t in _keys_values(cache, chunk.keys))
            mixed = attend(query, key, value, chunk.mask).permute(2, 0, 1, 3)
            out[chunk.lo : chunk.hi] = mixed[: chunk.hi - chunk.lo]
        return out.view(whole)

    def _decode(self, query: torch.Tensor, keys: KeyView, mask: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        """[count, kv_heads, padded group, dim] → [count, kv_heads, group, dim]: a group's heads are the query rows."""
        key, value = (t.transpose(1, 2) for t in _keys_values(cache, keys))
        return attend(query, key, value, mask).narrow(2, 0, self._group)


def _keys_values(cache: torch.Tensor, keys: KeyView) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, each [count, length, kv_heads, head_dim]."""
    slot, _, *inner = cache.stride()
    _, kinds, kv_heads, dim = cache.shape
    if keys.slots is not None:
        gathered = cache.index_select(0, keys.slots).view(1, keys.length, kinds, kv_heads, dim)
        return gathered[:, :, 0], gathered[:, :, 1]
    shape, strides = (keys.count, keys.length, kv_heads, dim), (keys.step * slot, slot, *inner)
    offset = keys.first * slot
    return cache.as_strided(shape, strides, offset), cache.as_strided(shape, strides, offset + kv_heads * dim)
