"""What `config.json` says that a checkpoint holds: its MoE shape and the name and shape of every tensor.

Pure functions of the parsed configuration, for the two families served: Mixtral and Qwen3-MoE.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moering.errors import CheckpointError
from moering.quantization import is_quantized

# architecture → (keys of the expert count, key of the expert's intermediate size, prefix within a layer, gate/up/down)
_FAMILIES = {
    "MixtralForCausalLM": (("num_local_experts",), "intermediate_size", "block_sparse_moe", ("w1", "w3", "w2")),
    # transformers 5 writes Qwen3-MoE's count as num_local_experts, older versions and the hub have num_experts
    "Qwen3MoeForCausalLM": (
        ("num_experts", "num_local_experts"),
        "moe_intermediate_size",
        "mlp",
        ("gate_proj", "up_proj", "down_proj"),
    ),
}


@dataclass(frozen=True)
class Layout:
    """Sizes of the model and how its family names its tensors."""

    architecture: str
    num_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    moe_intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    quantized: bool  # matrices may be fp8, with scales

    def expert_names(self, layer: int, expert: int) -> tuple[str, str, str]:
        """Gate, up and down projection of one expert in the per-expert layout."""
        *_, prefix, parts = _FAMILIES[self.architecture]
        gate, up, down = (f"model.layers.{layer}.{prefix}.experts.{expert}.{part}.weight" for part in parts)
        return gate, up, down

    def fused_names(self, layer: int) -> tuple[str, str]:
        """Gate and up, then down projection of all experts of a layer, as transformers 5 fuses them.

        [experts, 2 * intermediate, hidden], gate rows first, and [experts, hidden, intermediate].
        """
        return f"model.layers.{layer}.mlp.experts.gate_up_proj", f"model.layers.{layer}.mlp.experts.down_proj"

    def gate_names(self, layer: int) -> tuple[str, ...]:
        """The names that the gate's weight may have: with fused experts transformers 5 renames Mixtral's."""
        prefix = _FAMILIES[self.architecture][2]
        return tuple(f"model.layers.{layer}.{p}.gate.weight" for p in dict.fromkeys((prefix, "mlp")))

    def dense_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor that must be there besides experts and gates."""
        hidden, q_rows, kv_rows = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocab_size, hidden)
        yield "model.norm.weight", (hidden,)
        if not self.tied_embeddings:
            yield "lm_head.weight", (self.vocab_size, hidden)
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.input_layernorm.weight", (hidden,)
            yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
            yield f"{prefix}.self_attn.q_proj.weight", (q_rows, hidden)
            yield f"{prefix}.self_attn.k_proj.weight", (kv_rows, hidden)
            yield f"{prefix}.self_attn.v_proj.weight", (kv_rows, hidden)
            yield f"{prefix}.self_attn.o_proj.weight", (hidden, q_rows)
            if self.architecture == "Qwen3MoeForCausalLM":
                yield f"{prefix}.self_attn.q_norm.weight", (self.head_dim,)
                yield f"{prefix}.self_attn.k_norm.weight", (self.head_dim,)


def parse_layout(config: dict[str, Any], where: str) -> Layout:
    """The layout that `config` (read from file `where`) describes; raise `CheckpointError` for what is not served."""
    architecture = _architecture(config, where)
    count_keys, intermediate_key, *_ = _FAMILIES[architecture]
    hidden, heads = _size(config, ("hidden_size",), where), _size(config, ("num_attention_heads",), where)
    head_dim = hidden // heads if config.get("head_dim") is None else _size(config, ("head_dim",), where)
    layout = Layout(
        architecture=architecture,
        num_layers=_size(config, ("num_hidden_layers",), where),
        num_experts=_size(config, count_keys, where),
        top_k=_size(config, ("num_experts_per_tok",), where),
        hidden_size=hidden,
        moe_intermediate_size=_size(config, (intermediate_key,), where),
        num_heads=heads,
        num_kv_heads=_size(config, ("num_key_value_heads",), where),
        head_dim=head_dim,
        vocab_size=_size(config, ("vocab_size",), where),
        tied_embeddings=config.get("tie_word_embeddings") is True,
        quantized=is_quantized(config, where),
    )
    if layout.top_k > layout.num_experts:
        raise CheckpointError(f"{where}: num_experts_per_tok {layout.top_k} exceeds the {layout.num_experts} experts")
    return layout


def _architecture(config: dict[str, Any], where: str) -> str:
    architectures = config.get("architectures")
    if architectures not in [[name] for name in _FAMILIES]:
        raise CheckpointError(
            f"{where}: unsupported architecture {architectures!r}; supported are {', '.join(_FAMILIES)}"
        )
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise CheckpointError(
            f"{where}: mlp_only_layers {config.get('mlp_only_layers')} and decoder_sparse_step "
            f"{config.get('decoder_sparse_step')} ask for dense layers, which are not supported"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{where}: hidden_act {config['hidden_act']!r} is not supported, only silu")
    return str(config["architectures"][0])


def _size(config: dict[str, Any], keys: tuple[str, ...], where: str) -> int:
    value = next((config[key] for key in keys if key in config), None)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{where}: {keys[0]} is {value!r}, not a positive whole number")
    return value
