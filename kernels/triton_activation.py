"""What happens to a tile between the products: biases, SwiGLU, and gpt-oss's clamped SwiGLU."""

from __future__ import annotations

import triton
import triton.language as tl

GPT_OSS_ALPHA = tl.constexpr(1.702)


@triton.jit
def add_bias(values, bias_ptr, columns, live_columns, TRANSPOSED: tl.constexpr):
    """values [M, N], or [N, M] when TRANSPOSED, plus one number per column."""
    bias = tl.load(bias_ptr + columns, mask=live_columns, other=0.0).to(tl.float32)
    if TRANSPOSED:
        return values + bias[:, None]
    else:
        return values + bias[None, :]


@triton.jit
def swiglu(gate, up, LIMIT: tl.constexpr):
    """silu(gate) * up; with a LIMIT, gpt-oss's: both clamped, gate * sigmoid(1.702 * gate) * (up + 1)."""
    if LIMIT == 0:
        return gate * (1.0 / (1.0 + tl.exp(-gate))) * up
    else:
        gate = tl.minimum(gate, LIMIT)
        up = tl.maximum(tl.minimum(up, LIMIT), -LIMIT)
        return gate * (1.0 / (1.0 + tl.exp(-GPT_OSS_ALPHA * gate))) * (up + 1.0)


@triton.jit
def gated(
    gate, up, bias_ptr, expert, columns, intermediate,
    TRANSPOSED: tl.constexpr, BIAS: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """`swiglu` of an expert's columns after its biases, if any: [experts, 2 * intermediate], gate's before up's."""
    if BIAS:
        expert_bias_ptr = bias_ptr + expert * 2 * intermediate
        gate = add_bias(gate, expert_bias_ptr, columns, columns < intermediate, TRANSPOSED)
        up = add_bias(up, expert_bias_ptr + intermediate, columns, columns < intermediate, TRANSPOSED)
    return swiglu(gate, up, LIMIT)
