"""PyTorch reference of the Triton kernels: plain loops in the arithmetic's widest type."""

from __future__ import annotations

import torch


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float = 0) -> torch.Tensor:
    """silu(gate) * up; with a limit, gpt-oss's clamped activation."""
    if limit == 0:
        return torch.nn.functional.silu(gate) * up
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def expert_ffn(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    experts: torch.Tensor,
    rows: torch.Tensor,
    biases: tuple[torch.Tensor, torch.Tensor] | None = None,
    limit: float = 0,
) -> torch.Tensor:
    """down(silu(gate(x)) * up(x)) of each (row, expert) pair, in float64: [pairs, hidden], NaN where the expert is -1.

    w13: [experts, 2 * intermediate, hidden], gate above up; w2: [experts, hidden, intermediate]; biases: one number per
    row of each, added after the products.
    """
    out = torch.full((experts.numel(), w2.shape[1]), float("nan"), dtype=torch.float64, device=hidden_states.device)
    for pair, (expert, row) in enumerate(zip(experts.tolist(), rows.tolist(), strict=True)):
        if expert >= 0:
            both = w13[expert].double() @ hidden_states[row].double()
            if biases is not None:
                both = both + biases[0][expert].double()
            gate, up = both.chunk(2)
            out[pair] = w2[expert].double() @ swiglu(gate, up, limit)
            if biases is not None:
                out[pair] += biases[1][expert].double()
    return out


def combine(pair_rows: torch.Tensor, topk_weights: torch.Tensor, experts: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply and add in top-k order in float32, as the router does; pairs whose expert is negative count as zeros."""
    rows, top_k = topk_weights.shape
    values = pair_rows.float().view(rows, top_k, -1)
    if experts is not None:
        values = torch.where(experts.view(rows, top_k, 1) >= 0, values, 0.0)
    total = torch.zeros_like(values[:, 0])
    for slot in range(top_k):
        total += topk_weights[:, slot, None] * values[:, slot]
    return total.to(pair_rows.dtype)


def paged_attention(
    query: torch.Tensor, cache: torch.Tensor, tables: torch.Tensor, sequences: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Every row's attention over its sequence's keys up to its position, in float64: [n, heads, dim].

    query: [n, heads, dim]; cache: [pages, 2, kv_heads, page, dim]; tables: [sequences, pages]; the others [n].
    """
    rows, heads, dim = query.shape
    _, _, kv_heads, page, _ = cache.shape
    out = torch.empty(rows, heads, dim, dtype=torch.float64, device=query.device)
    for row, (sequence, position) in enumerate(zip(sequences.tolist(), positions.tolist(), strict=True)):
        pages = tables[sequence, : position // page + 1].long()
        keys, values = cache[pages].double().permute(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, dim)[:, :, : position + 1]
        grouped = query[row].double().view(kv_heads, heads // kv_heads, dim)
        weights = torch.softmax(grouped @ keys.transpose(1, 2) / dim**0.5, -1)
        out[row] = (weights @ values).view(heads, dim)
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, in float64."""
    wide = x.double()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.double()


def rotary(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """heads [n, h, dim] turned by the angles of each row, [n, dim / 2]; halves (i, i + dim/2) turn together."""
    low, high = heads.double().chunk(2, -1)
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


def choose_experts(scores: torch.Tensor, top_k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int64 and weights [n, k] of the highest scores, the lower id first among equal ones."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :top_k]
    chosen = scores.double().gather(1, order)
    return order, torch.softmax(chosen, -1) if normalize else torch.softmax(scores.double(), -1).gather(1, order)
