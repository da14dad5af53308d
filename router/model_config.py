"""What the decoder needs to know of a checkpoint's `config.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moering.checkpoint import Checkpoint
from moering.errors import CheckpointError


@dataclass(frozen=True)
class MoEModelConfig:
    """Sizes and constants of a Mixtral or Qwen3-MoE decoder."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_experts: int
    top_k: int
    moe_intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    max_positions: int
    normalize_topk: bool  # the weights of a token's experts sum to 1
    head_norms: bool  # each query and key head is normed before the rotary embedding
    tied_embeddings: bool

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> MoEModelConfig:
        """Read and check the configuration; raise `CheckpointError` for what the decoder does not compute."""
        config, layout = checkpoint.config, checkpoint.layout
        where = str(checkpoint.path / "config.json")
        qwen3 = layout.architecture == "Qwen3MoeForCausalLM"
        _refuse_unsupported(config, where, layout.num_heads, layout.num_kv_heads, layout.head_dim, qwen3)
        return cls(
            num_layers=layout.num_layers,
            hidden_size=layout.hidden_size,
            num_heads=layout.num_heads,
            num_kv_heads=layout.num_kv_heads,
            head_dim=layout.head_dim,
            vocab_size=layout.vocab_size,
            num_experts=layout.num_experts,
            top_k=layout.top_k,
            moe_intermediate_size=layout.moe_intermediate_size,
            rms_norm_eps=_positive(config, "rms_norm_eps", where, default=1e-6 if qwen3 else 1e-5),
            rope_theta=_rope_theta(config, where, default=1e4 if qwen3 else 1e6),
            max_positions=int(_positive(config, "max_position_embeddings", where)),
            normalize_topk=bool(config.get("norm_topk_prob", False)) if qwen3 else True,
            head_norms=qwen3,
            tied_embeddings=layout.tied_embeddings,
        )


def _refuse_unsupported(
    config: dict[str, Any], where: str, heads: int, kv_heads: int, head_dim: int, qwen3: bool
) -> None:
    if heads % kv_heads or head_dim % 2:
        raise CheckpointError(f"{where}: {heads} heads over {kv_heads} key/value heads of {head_dim} are not supported")
    window = config.get("sliding_window")
    if window is not None and (config.get("use_sliding_window") or not qwen3):
        raise CheckpointError(f"{where}: sliding_window {window} is not supported")
    if config.get("attention_bias"):
        raise CheckpointError(f"{where}: attention_bias is not supported")


def _rope_theta(config: dict[str, Any], where: str, default: float) -> float:
    """From `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (before)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{where}: the rotary embedding's parameters are {rope!r}, not an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"{where}: the rotary embedding {rope!r} is not supported, only the default kind")
    source = rope if "rope_theta" in rope else config
    return _positive(source, "rope_theta", where, default)


def _positive(config: dict[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise CheckpointError(f"{where}: {key} is {value!r}, not a positive number")
    return float(value)
