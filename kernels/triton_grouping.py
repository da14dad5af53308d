"""Group (row, expert) pairs by expert into row tiles, on the device and without a synchronisation.

The grouped GEMMs walk a tile list: which expert, where its pairs start in the grouped order, how many rows. Everything
here is sized by the number of pairs alone, so a CUDA graph can capture it. The order of the pairs *within* an expert is
left to atomics, hence not reproducible; it may be, because a row's bits do not depend on its place (tests hold this).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

TILE_FIELDS = tl.constexpr(8)
"""Size of a tile's entry: expert, first grouped position, rows, the expert's first tile, its tile count, the position
after its last row, a counter for who computes the tile, unused."""
COUNTER_FIELD = tl.constexpr(6)

SINGLE_PROGRAM_PAIRS = 2048
"""Up to here one program does everything in one launch; above, three launches spread over the device."""


@triton.jit
def _count(experts_ptr, rank_ptr, counts_ptr, pairs, first, BLOCK: tl.constexpr):
    index = first + tl.arange(0, BLOCK)
    expert = tl.load(experts_ptr + index, mask=index < pairs, other=-1)
    local = expert >= 0
    rank = tl.atomic_add(counts_ptr + expert, 1, mask=local, sem="relaxed")
    tl.store(rank_ptr + index, rank, mask=local)


@triton.jit
def _write_tiles(expert, count, tiles_ptr, num_tiles_ptr, BLOCK_M: tl.constexpr):
    """The entries of all tiles, `count` pairs of each `expert`; returns where each one's pairs start."""
    offset = tl.cumsum(count) - count
    tiles = (count + BLOCK_M - 1) // BLOCK_M
    tile = tl.cumsum(tiles) - tiles
    tl.store(num_tiles_ptr, tl.sum(tiles))
    for part in range(tl.max(tiles)):
        entry = tiles_ptr + TILE_FIELDS * (tile + part)
        here = part < tiles
        tl.store(entry, expert, mask=here)
        tl.store(entry + 1, offset + part * BLOCK_M, mask=here)
        tl.store(entry + 2, tl.minimum(count - part * BLOCK_M, BLOCK_M), mask=here)
        tl.store(entry + 3, tile, mask=here)
        tl.store(entry + 4, tiles, mask=here)
        tl.store(entry + 5, offset + count, mask=here)
        tl.store(entry + COUNTER_FIELD, tl.zeros_like(count), mask=here)
    return offset


@triton.jit
def _list_tiles(
    counts_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr, num_experts, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr
):
    expert = tl.arange(0, EXPERTS)
    valid = expert < num_experts
    count = tl.load(counts_ptr + expert, mask=valid, other=0)
    offset = _write_tiles(expert, count, tiles_ptr, num_tiles_ptr, BLOCK_M)
    tl.store(offsets_ptr + expert, offset, mask=valid)
    tl.store(counts_ptr + expert, tl.zeros_like(count), mask=valid)  # ready for the next call


@triton.jit
def _list_sorted_kernel(
    num_experts_ptr, counts_ptr, experts_ptr, tiles_ptr, num_tiles_ptr, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr
):
    n = tl.arange(0, EXPERTS)
    valid = n < tl.load(num_experts_ptr)
    count = tl.load(counts_ptr + n, mask=valid, other=0)
    _write_tiles(tl.load(experts_ptr + n, mask=valid, other=0), count, tiles_ptr, num_tiles_ptr, BLOCK_M)


@triton.jit
def _place(
    experts_ptr, rows_ptr, rank_ptr, offsets_ptr, order_ptr, sorted_rows_ptr, pairs, top_k, first, BLOCK: tl.constexpr
):
    pair = first + tl.arange(0, BLOCK)
    expert = tl.load(experts_ptr + pair, mask=pair < pairs, other=-1)
    local = expert >= 0
    position = tl.load(offsets_ptr + expert, mask=local) + tl.load(rank_ptr + pair, mask=local)
    if top_k == 0:
        row = tl.load(rows_ptr + pair, mask=local)
    else:
        row = pair // top_k
    tl.store(order_ptr + position, pair, mask=local)
    tl.store(sorted_rows_ptr + position, row, mask=local)


@triton.jit
def _group_small_kernel(
    experts_ptr, rows_ptr, rank_ptr, counts_ptr, offsets_ptr, order_ptr, sorted_rows_ptr, tiles_ptr, num_tiles_ptr,
    pairs, top_k, num_experts, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _count(experts_ptr, rank_ptr, counts_ptr, pairs, 0, BLOCK)
    tl.debug_barrier()
    _list_tiles(counts_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr, num_experts, EXPERTS, BLOCK_M)
    tl.debug_barrier()
    _place(experts_ptr, rows_ptr, rank_ptr, offsets_ptr, order_ptr, sorted_rows_ptr, pairs, top_k, 0, BLOCK)


@triton.jit
def _count_kernel(experts_ptr, rank_ptr, counts_ptr, pairs, BLOCK: tl.constexpr):
    _count(experts_ptr, rank_ptr, counts_ptr, pairs, tl.program_id(0) * BLOCK, BLOCK)


@triton.jit
def _list_tiles_kernel(
    counts_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr, num_experts, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr
):
    _list_tiles(counts_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr, num_experts, EXPERTS, BLOCK_M)


@triton.jit
def _place_kernel(
    experts_ptr, rows_ptr, rank_ptr, offsets_ptr, order_ptr, sorted_rows_ptr, pairs, top_k, BLOCK: tl.constexpr
):
    first = tl.program_id(0) * BLOCK
    _place(experts_ptr, rows_ptr, rank_ptr, offsets_ptr, order_ptr, sorted_rows_ptr, pairs, top_k, first, BLOCK)


@dataclass(frozen=True)
class Grouping:
    """The grouped order of `pairs` pairs, device tensors, int32.

    order: [pairs], grouped position -> pair.  rows: [pairs], grouped position -> row of the hidden states.
    tiles: [max_tiles, TILE_FIELDS], see TILE_FIELDS; only num_tiles are set, an expert's tiles follow each other.
    num_tiles: [1]. Positions past the local pairs (expert -1) are not set.
    """

    order: torch.Tensor
    rows: torch.Tensor
    tiles: torch.Tensor
    num_tiles: torch.Tensor
    block_m: int

    @property
    def max_tiles(self) -> int:
        """Upper bound of num_tiles, known without reading the device."""
        return self.tiles.shape[0]


def list_sorted(
    num_experts: torch.Tensor, counts: torch.Tensor, experts: torch.Tensor, tiles: torch.Tensor,
    num_tiles: torch.Tensor, block_m: int,
) -> None:  # fmt: skip
    """Fill `tiles` and `num_tiles`, see `Grouping`, for pairs that are sorted by expert already.

    The first `num_experts` [1] of `counts`, above 0, and of `experts`: int32 [n] on the device, n a power of two.
    """
    _list_sorted_kernel[(1,)](
        num_experts, counts, experts, tiles, num_tiles, EXPERTS=counts.shape[0], BLOCK_M=block_m, num_warps=8
    )  # fmt: skip


class PairGrouper:
    """Groups pairs for one device; owns the counters, which every call leaves zeroed."""

    def __init__(self, num_experts: int, device: torch.device) -> None:
        self.num_experts = num_experts
        self._counts = torch.zeros(num_experts, dtype=torch.int32, device=device)
        self._offsets = torch.zeros(num_experts, dtype=torch.int32, device=device)

    def group(self, experts: torch.Tensor, rows: torch.Tensor | None, top_k: int, block_m: int) -> Grouping:
        """Group pairs by expert into tiles of at most block_m rows.

        experts: [pairs] int32, the local expert of each pair, -1 where another server has it.
        rows: [pairs] int32, the row of each pair; None when pair i belongs to row i // top_k.
        """
        pairs = experts.numel()
        max_tiles = min(pairs, pairs // block_m + self.num_experts)
        sizes = (
            pairs,
            pairs,
            pairs,
            TILE_FIELDS.value * max_tiles,
            1,
        )  # not views of one: those are less aligned
        rank, order, sorted_rows, tiles, num_tiles = (experts.new_empty(size) for size in sizes)
        shape = {"EXPERTS": triton.next_power_of_2(self.num_experts), "BLOCK_M": block_m}
        rows_arg = experts if rows is None else rows
        top_k = 0 if rows is not None else top_k
        if pairs <= SINGLE_PROGRAM_PAIRS:
            block = max(triton.next_power_of_2(pairs), 32)
            _group_small_kernel[(1,)](
                experts, rows_arg, rank, self._counts, self._offsets, order, sorted_rows, tiles, num_tiles,
                pairs, top_k, self.num_experts, **shape, BLOCK=block, num_warps=min(max(block // 64, 4), 16),
            )  # fmt: skip
        else:
            block = 512
            grid = (triton.cdiv(pairs, block),)
            _count_kernel[grid](experts, rank, self._counts, pairs, BLOCK=block)
            _list_tiles_kernel[(1,)](self._counts, self._offsets, tiles, num_tiles, self.num_experts, **shape)
            _place_kernel[grid](
                experts, rows_arg, rank, self._offsets, order, sorted_rows, pairs, top_k, BLOCK=block
            )  # fmt: skip
        return Grouping(order, sorted_rows, tiles.view(max_tiles, TILE_FIELDS.value), num_tiles, block_m)
