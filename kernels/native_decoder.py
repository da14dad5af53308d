"""The structures that `kernels._native` computes a layer's attention and gate with; their fields are addresses."""

from __future__ import annotations

import ctypes

from kernels.native_linear import Weight, available

if available():
    from kernels._native import (
        BLOCK,
        MAX_DIM,
        MAX_QUERIES,
        STRUCT_BYTES,
        after_experts,
        rms_norm,
        until_experts,
    )  # fmt: skip

    __all__ = ["BLOCK", "Batch", "Layer", "Model", "after_experts", "rms_norm", "supported", "until_experts"]

QUERIES_TOGETHER = 12
"""Heads of the rows of a prompt that attend together: keys are transposed once for all of them, and their scores stay
in a core's first cache."""

_LONG, _ADDRESS = ctypes.c_int64, ctypes.c_void_p


class Model(ctypes.Structure):
    """Sizes of a decoder. `cosines` and `sines` are float32 [positions, dim / 2]."""

    _fields_ = (
        *((name, _LONG) for name in ("hidden", "heads", "kv_heads", "dim", "experts", "top_k", "over_chosen")),
        *((name, _ADDRESS) for name in ("cosines", "sines")),
        ("eps", ctypes.c_double),
    )


class Layer(ctypes.Structure):
    """Weights of a layer outside its experts, norms in float32, and its part of the KV cache."""

    _fields_ = (
        *((name, _ADDRESS) for name in ("attention_norm", "experts_norm", "query_norm", "key_norm")),
        *((name, Weight) for name in ("qkv", "o_proj", "gate")),
        ("cache", _ADDRESS),
    )


class Batch(ctypes.Structure):
    """Rows on their way; `csrc/native.c` says the arrays' shapes."""

    _fields_ = (
        *((name, _LONG) for name in ("rows", "groups")),
        *((name, _ADDRESS) for name in ("positions", "tables", "group_starts", "residual", "expert_input")),
        *((name, _ADDRESS) for name in ("topk_ids", "topk_weights", "qkv", "mixed", "scores")),
    )


def supported(heads: int, kv_heads: int, dim: int, block_size: int) -> bool:
    """Whether heads of these sizes can attend here, to keys in blocks of so many. `RuntimeError`: an older build."""
    if not available():
        return False
    if sum(map(ctypes.sizeof, (Weight, Model, Layer, Batch))) != STRUCT_BYTES:
        raise RuntimeError("kernels/_native is of another version: install moering again")
    return block_size == BLOCK and dim % 16 == 0 and dim <= MAX_DIM and heads // kv_heads <= MAX_QUERIES
