"""The paged KV cache in GPU memory. Who holds which page is `router.kv_cache.BlockManager`'s business here too."""

from __future__ import annotations

import torch

from kernels.triton_attention import PAGE_KEYS


class KVCache:
    """Keys and values of all layers: `layers[i]` is [pages, 2, kv_heads, page, head_dim] bfloat16.

    One page more than blocks are handed out: rows that only fill up a batch write there. Zeroed at the start: a masked
    key's value must be finite, so that its share is exactly 0.
    """

    def __init__(
        self, num_layers: int, num_kv_heads: int, head_dim: int, num_blocks: int, device: torch.device | str = "cuda"
    ) -> None:
        self.num_blocks, self.block_size = num_blocks, PAGE_KEYS
        shape = (num_blocks + 1, 2, num_kv_heads, PAGE_KEYS, head_dim)
        self.layers = [torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in range(num_layers)]

    @property
    def spare_page(self) -> int:
        """The page that belongs to nobody."""
        return self.num_blocks

    def copy_block(self, source: int, destination: int) -> None:
        """Give one page the content of another, in all layers."""
        for layer in self.layers:
            layer[destination].copy_(layer[source])

    @staticmethod
    def block_bytes(num_layers: int, num_kv_heads: int, head_dim: int) -> int:
        """Bytes of one block over all layers."""
        return num_layers * PAGE_KEYS * 2 * num_kv_heads * head_dim * torch.bfloat16.itemsize
