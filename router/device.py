"""Which KV cache, decoder and sampler a router gets: by `--device`. All above them is the same. Imports torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moering.checkpoint import Checkpoint
from moering.errors import ConfigError
from router.config import Config
from router.model_config import MoEModelConfig


@dataclass(frozen=True)
class Parts:
    """What depends on the device. `decoder` is a `router.decoder.Decoder` or of the same interface."""

    decoder: Any
    sampler: Any
    num_blocks: int
    block_size: int
    copy_block: Callable[[int, int], None]  # (source, destination)


def build_parts(config: Config, checkpoint: Checkpoint, decoder_class: type | None = None) -> Parts:
    """Load the weights outside the experts; raise `ConfigError` for a device that is not there or a cache too small.

    `decoder_class` stands in for the device's own decoder.
    """
    torch.set_grad_enabled(False)
    if config.device == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("--device cuda: PyTorch finds no GPU")
        return cuda_parts(config, checkpoint, decoder_class)
    from router.kv_cache import KVCache
    from router.sampler import Sampler

    cache = KVCache(*_shape(checkpoint), _num_blocks(config, checkpoint, KVCache))
    decoder = (decoder_class or cpu_decoder)(checkpoint, cache, config.backend)
    return Parts(decoder, Sampler(), cache.num_blocks, cache.block_size, cache.copy_block)


def cpu_decoder(checkpoint: Checkpoint, cache: Any, backend: Any = "auto") -> Any:
    """The decoder of `router.decoder_native` where that backend is there and can compute such heads, else PyTorch's."""
    from kernels.linear import resolve_backend
    from kernels.native_decoder import supported
    from router import decoder, decoder_native

    model = MoEModelConfig.from_checkpoint(checkpoint)
    if resolve_backend(backend) == "native" and supported(
        model.num_heads, model.num_kv_heads, model.head_dim, cache.block_size
    ):
        return decoder_native.Decoder(checkpoint, cache)
    return decoder.Decoder(checkpoint, cache, backend)


def cuda_parts(config: Config, checkpoint: Checkpoint, decoder_class: type | None, device: str = "cuda") -> Parts:
    """The parts for a GPU; on `device` "cpu" for Triton's interpreter."""
    from router.decoder_cuda import Decoder
    from router.kv_cache_cuda import KVCache
    from router.sampler_cuda import Sampler

    cache = KVCache(*_shape(checkpoint), _num_blocks(config, checkpoint, KVCache), device)
    max_rows = config.max_num_batched_tokens + config.max_num_seqs  # prefill tokens, and a row of each that decodes
    model = MoEModelConfig.from_checkpoint(checkpoint)
    length = max_length(config, model)
    decoder = (decoder_class or Decoder)(checkpoint, cache, max_rows, config.max_num_seqs, length, device=device)
    if device == "cuda":
        decoder.warm_up()
    return Parts(decoder, Sampler(), cache.num_blocks, cache.block_size, cache.copy_block)


def max_length(config: Config, model: MoEModelConfig) -> int:
    """Tokens of the longest sequence."""
    return min(config.max_model_len or model.max_positions, model.max_positions)


def _shape(checkpoint: Checkpoint) -> tuple[int, int, int]:
    model = MoEModelConfig.from_checkpoint(checkpoint)
    return model.num_layers, model.num_kv_heads, model.head_dim


def _num_blocks(config: Config, checkpoint: Checkpoint, cache: Any) -> int:
    num_blocks = (config.kv_cache_mb << 20) // int(cache.block_bytes(*_shape(checkpoint)))
    if num_blocks < 1:
        raise ConfigError(f"--kv-cache-mb {config.kv_cache_mb} is less than one block of this model")
    return num_blocks
