"""The paged KV cache: its memory, and who holds which block of it."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch

from kernels.attention import KEY_BLOCK
from router.prefix_cache import PrefixCache

BLOCK_SIZE = KEY_BLOCK  # attention reads whole blocks of keys, so a block that is one needs no gather


class KVCache:
    """Keys and values of all layers: `layers[i]` is [num_blocks * block_size, 2, kv_heads, head_dim] float32.

    Key and value of a position lie together, so one copy writes both, and consecutive blocks are one strided view.
    Zeroed at the start: masked positions must hold finite numbers, whose share is then exactly 0.
    """

    def __init__(
        self, num_layers: int, num_kv_heads: int, head_dim: int, num_blocks: int, block_size: int = BLOCK_SIZE
    ) -> None:
        if block_size != BLOCK_SIZE:
            raise ValueError(f"block_size {block_size}: attention's bits ask for {BLOCK_SIZE}")
        self.num_blocks, self.block_size = num_blocks, block_size
        shape = (num_blocks * block_size, 2, num_kv_heads, head_dim)
        self.layers = [_lazy_zeros(shape) for _ in range(num_layers)]

    @property
    def nbytes(self) -> int:
        """Bytes of all layers; the system provides them when they are first written."""
        return sum(layer.nbytes for layer in self.layers)

    def copy_block(self, source: int, destination: int) -> None:
        """Give one block the content of another, in all layers."""
        size = self.block_size
        for layer in self.layers:
            layer[destination * size :][:size].copy_(layer[source * size :][:size])

    @staticmethod
    def block_bytes(num_layers: int, num_kv_heads: int, head_dim: int) -> int:
        """Bytes of one block over all layers."""
        return num_layers * BLOCK_SIZE * 2 * num_kv_heads * head_dim * 4


def _lazy_zeros(shape: tuple[int, ...]) -> torch.Tensor:
    """Zeros that take memory only where they are written; `torch.zeros` would touch every page now."""
    memory = mmap.mmap(-1, math.prod(shape) * torch.float32.itemsize)
    return torch.frombuffer(memory, dtype=torch.float32).view(shape)


class BlockManager:
    """Hands out blocks so that a sequence's blocks are consecutive and sequences start at regular distances.

    Attention then runs on views of the cache, many sequences in one call; any other layout costs a gather, no more.
    A free block may still hold a prefix of `prefixes`, which is told when the block is handed out.
    """

    def __init__(self, num_blocks: int, prefixes: PrefixCache, span: int = 1) -> None:
        """`span`: blocks of the longest sequence; while memory is plentiful each one gets room to grow that far."""
        if num_blocks < 1 or span < 1:
            raise ValueError(f"{num_blocks} blocks in spans of {span}")
        self.num_blocks = num_blocks
        self._span, self._prefixes = span, prefixes
        self._is_free = [True] * num_blocks
        self._free_count = num_blocks

    @property
    def free_blocks(self) -> int:
        """Number of free blocks."""
        return self._free_count

    def allocate(self, n: int, after: int | None = None) -> list[int]:
        """`n` blocks, `after` being the last block of the sequence that they extend; raise `ValueError` if too many.

        In order of preference: right behind `after`; a free and aligned span; a free run of n; any n. Among these
        those that hold no prefix, then those whose prefixes were used longest ago; of equal ones the lowest.
        """
        if n > self._free_count:
            raise ValueError(f"{n} blocks asked for, {self._free_count} are free")
        start = self._find_run(n, after)
        if start is not None:
            blocks = list(range(start, start + n))
        else:
            free = (b for b in range(self.num_blocks) if self._is_free[b])
            blocks = sorted(sorted(free, key=self._prefixes.last_use)[:n])
        for block in blocks:
            self._is_free[block] = False
            self._prefixes.forget(block)
        self._free_count -= n
        return blocks

    def free(self, blocks: Sequence[int]) -> None:
        """Give a sequence's blocks back; raise `ValueError` for one that is not handed out."""
        for block in reversed(blocks):  # as `PrefixCache.touch` wants it
            if not 0 <= block < self.num_blocks or self._is_free[block]:
                raise ValueError(f"block {block} is not handed out")
            self._is_free[block] = True
            self._free_count += 1
            self._prefixes.touch(block)

    def check_integrity(self) -> None:
        """Assert that the count of free blocks is what the table says."""
        assert self._free_count == sum(self._is_free), "the count of free KV blocks is wrong"

    def _find_run(self, n: int, after: int | None) -> int | None:
        if after is not None and self._last_use(after + 1, n) is not None:
            return after + 1
        spans = range(0, self.num_blocks - self._span + 1, self._span) if n <= self._span else range(0)
        start = self._longest_unused(spans, self._span)
        return start if start is not None else self._longest_unused(range(self.num_blocks - n + 1), n)

    def _longest_unused(self, starts: range, n: int) -> int | None:
        """Of the free runs of `n` blocks that begin at one of `starts` the one to take."""
        best: tuple[int, int] | None = None
        for start in starts:
            last_use = self._last_use(start, n)
            if last_use == 0:
                return start
            if last_use is not None and (best is None or (last_use, start) < best):
                best = (last_use, start)
        return best[1] if best else None

    def _last_use(self, start: int, n: int) -> int | None:
        """When a prefix in this run of blocks was last used, 0 where it holds none; None if a block is not free."""
        if start + n > self.num_blocks or not all(self._is_free[start : start + n]):
            return None
        return max((self._prefixes.last_use(block) for block in range(start, start + n)), default=0)
