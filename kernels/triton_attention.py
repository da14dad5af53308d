"""Paged grouped-query attention on a GPU whose rows do not depend on each other, in decode and in chunked prefill.

The keys of a sequence are cut into splits of `SPLIT_KEYS`, at fixed positions whatever the row or the chunk. Within a
split keys come page by page under a running maximum; splits are then merged from the first to the last. Decode gives
every split a program and merges in a second kernel, prefill walks the splits in one program; both run the same steps on
the same numbers, so they give the same bits (tests hold this on a GPU). What makes the steps the same:

* products are matrix instructions that add K upwards; also the sum of a row's weights, as a product with ones, because
  the order of a reduction over threads follows the tile;
* no fused multiply-add chosen by the compiler (`enable_fp_fusion`): it may choose otherwise in the other kernel;
* a page of which a row sees nothing changes none of its numbers: its weights are exactly 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

PAGE_KEYS = 64
SPLIT_KEYS = 256
LOG2_E = 1.4426950408889634


@triton.jit
def _one_split(
    query, position, key_ptr, value_ptr, table_ptr, page_stride, first, end, scale,
    ROWS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Running maximum [ROWS], sum of weights [ROWS, 16] (all columns equal) and weighted values [ROWS, DIM] over the
    keys [first, min(first + SPLIT, end)) that each row sees: those up to its position."""
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, 16), tl.float32)
    mixed = tl.zeros((ROWS, DIM), tl.float32)
    place = tl.arange(0, PAGE)
    inside = place[:, None] * DIM + tl.arange(0, DIM)[None, :]
    ones = tl.full((PAGE, 16), 1.0, tl.float32).to(query.dtype)
    for start in range(first, tl.minimum(first + SPLIT, end), PAGE):
        page = tl.load(table_ptr + start // PAGE).to(tl.int64) * page_stride
        written = (start + place < end)[:, None]
        key = tl.load(key_ptr + page + inside, mask=written, other=0.0)
        scores = tl.dot(query, key.T) * scale
        scores = tl.where((start + place)[None, :] <= position[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - finite_top[:, None]).to(query.dtype)
        shrink = tl.exp2(top - finite_top)
        value = tl.load(value_ptr + page + inside, mask=written, other=0.0)
        total = tl.dot(weights, ones, total * shrink[:, None])
        mixed = tl.dot(weights, value, mixed * shrink[:, None])
        top = new_top
    return top, tl.max(total, axis=1), mixed


@triton.jit
def _shares(top, new):
    """What the numbers so far and those of one more split are multiplied by: (so far, new)."""
    both = tl.maximum(top, new)
    return tl.exp2(top - both), tl.exp2(new - both), both


@triton.jit
def decode_kernel(
    query_ptr, cache_ptr, tables_ptr, table_stride, row_ids_ptr, sequences_ptr, positions_ptr,
    tops_ptr, totals_ptr, mixed_ptr, splits, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    PAGE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One split of one row's keys for the heads of one group: program (row, kv head, split)."""
    index = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    row = tl.load(row_ids_ptr + index).to(tl.int64)
    last = tl.load(positions_ptr + row)
    if split * SPLIT <= last:
        member = tl.arange(0, ROWS)
        live = member < GROUP
        head = kv_head * GROUP + member
        d = tl.arange(0, DIM)
        query = tl.load(query_ptr + (row * HEADS + head)[:, None] * DIM + d[None, :], mask=live[:, None], other=0.0)
        key_ptr = cache_ptr + kv_head * PAGE * DIM
        table_ptr = tables_ptr + tl.load(sequences_ptr + row).to(tl.int64) * table_stride
        top, total, mixed = _one_split(
            query, tl.full((ROWS,), 0, tl.int32) + last, key_ptr, key_ptr + KV_HEADS * PAGE * DIM, table_ptr,
            2 * KV_HEADS * PAGE * DIM, split * SPLIT, last + 1, scale, ROWS, DIM, PAGE, SPLIT,
        )  # fmt: skip
        out = (index * splits + split).to(tl.int64) * HEADS + head
        tl.store(tops_ptr + out, top, mask=live)
        tl.store(totals_ptr + out, total, mask=live)
        tl.store(mixed_ptr + out[:, None] * DIM + d[None, :], mixed, mask=live[:, None])


@triton.jit
def merge_kernel(
    out_ptr, row_ids_ptr, positions_ptr, tops_ptr, totals_ptr, mixed_ptr, splits,
    HEADS: tl.constexpr, DIM: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The splits of one (row, head) become its attention."""
    index = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.load(row_ids_ptr + index).to(tl.int64)
    d = tl.arange(0, DIM)
    top = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    mixed = tl.zeros((DIM,), tl.float32)
    one = tl.arange(0, 1)
    for split in range(0, tl.load(positions_ptr + row) // SPLIT + 1):
        at = (index * splits + split).to(tl.int64) * HEADS + head
        keep, take, top = _shares(top, tl.load(tops_ptr + at + one))
        total = total * keep + tl.load(totals_ptr + at + one) * take
        mixed = mixed * keep + tl.load(mixed_ptr + at * DIM + d) * take
    tl.store(out_ptr + (row * HEADS + head) * DIM + d, (mixed / total).to(out_ptr.dtype.element_ty))


@triton.jit
def prefill_kernel(
    query_ptr, cache_ptr, tables_ptr, table_stride, tiles_ptr, sequences_ptr, positions_ptr, out_ptr, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    DIM: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """A tile of one sequence's consecutive rows for the heads of one group: program (tile, kv head).

    tiles: (first row, rows) each. A row has PADDED places in the tile, the first GROUP of them its heads.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    first_row = tl.load(tiles_ptr + 2 * tile).to(tl.int64)
    rows = tl.load(tiles_ptr + 2 * tile + 1)
    place = tl.arange(0, ROWS)
    row = first_row + place // PADDED
    live = (place // PADDED < rows) & (place % PADDED < GROUP)
    position = tl.load(positions_ptr + first_row) + place // PADDED
    end = tl.load(positions_ptr + first_row) + rows
    position = tl.minimum(position, end - 1)  # padding sees what the last row sees
    d = tl.arange(0, DIM)
    at = (row * HEADS + kv_head * GROUP + place % PADDED)[:, None] * DIM + d[None, :]
    query = tl.load(query_ptr + at, mask=live[:, None], other=0.0)
    key_ptr = cache_ptr + kv_head * PAGE * DIM
    table_ptr = tables_ptr + tl.load(sequences_ptr + first_row).to(tl.int64) * table_stride
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, DIM), tl.float32)
    for first in range(0, end, SPLIT):
        new_top, new_total, new_mixed = _one_split(
            query, position, key_ptr, key_ptr + KV_HEADS * PAGE * DIM, table_ptr, 2 * KV_HEADS * PAGE * DIM,
            first, end, scale, ROWS, DIM, PAGE, SPLIT,
        )  # fmt: skip
        keep, take, top = _shares(top, new_top)
        total = total * keep + new_total * take
        mixed = mixed * keep[:, None] + new_mixed * take[:, None]
    tl.store(out_ptr + at, (mixed / total[:, None]).to(out_ptr.dtype.element_ty), mask=live[:, None])


@dataclass(frozen=True)
class PagedRows:
    """Where the keys of each row lie. Device tensors, int32.

    tables: [sequences, pages], page numbers of each sequence.  sequences, positions: [n], of each row.  decode_rows:
    [m], rows that are their sequence's only one.  tiles: [t, 2], (first row, rows ≤ tile_rows) of the others.
    splits: at least as many as the longest sequence of a decode row has.
    """

    tables: torch.Tensor
    sequences: torch.Tensor
    positions: torch.Tensor
    decode_rows: torch.Tensor
    tiles: torch.Tensor
    tile_rows: int
    splits: int


@dataclass(frozen=True)
class DecodeScratch:
    """What decode's splits leave for the merge: [m, splits, heads] maxima and sums, [m, splits, heads, dim] values."""

    tops: torch.Tensor
    totals: torch.Tensor
    mixed: torch.Tensor

    @classmethod
    def empty(cls, rows: int, splits: int, heads: int, dim: int, device: torch.device) -> DecodeScratch:
        """For so many decode rows and splits."""
        tops, totals = torch.empty(2, rows * splits * heads, device=device)
        return cls(tops, totals, torch.empty(rows * splits * heads * dim, device=device))


def paged_attention(
    query: torch.Tensor, cache: torch.Tensor, rows: PagedRows, out: torch.Tensor, scratch: DecodeScratch
) -> None:
    """Softmax attention of each row over its sequence's keys up to its position, scaled by 1/sqrt(head_dim).

    query and out: [n, heads, head_dim]; cache: [pages, 2, kv_heads, PAGE_KEYS, head_dim], keys and values; head_dim a
    power of two from 16 on. Rows that are in neither list of `rows` are left alone.
    """
    _, heads, dim = query.shape
    _, _, kv_heads, page, _ = cache.shape
    if page != PAGE_KEYS or heads % kv_heads or dim < 16 or dim & (dim - 1):
        raise ValueError(f"{heads} heads over {kv_heads} of {dim} with pages of {page} keys are not supported")
    group = heads // kv_heads
    padded = triton.next_power_of_2(group)
    sizes = {"HEADS": heads, "KV_HEADS": kv_heads, "GROUP": group, "DIM": dim, "PAGE": page, "SPLIT": SPLIT_KEYS}
    scale = LOG2_E / dim**0.5
    decodes, tiles, s = rows.decode_rows.shape[0], rows.tiles.shape[0], scratch
    if decodes:
        decode_kernel[(decodes, kv_heads, rows.splits)](
            query, cache, rows.tables, rows.tables.stride(0), rows.decode_rows, rows.sequences, rows.positions,
            s.tops, s.totals, s.mixed, rows.splits, scale, **sizes, ROWS=max(padded, 16), num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
        merge_kernel[(decodes, heads)](
            out, rows.decode_rows, rows.positions, s.tops, s.totals, s.mixed, rows.splits,
            HEADS=heads, DIM=dim, SPLIT=SPLIT_KEYS, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    if tiles:
        prefill_kernel[(tiles, kv_heads)](
            query, cache, rows.tables, rows.tables.stride(0), rows.tiles, rows.sequences, rows.positions, out, scale,
            **sizes, PADDED=padded, ROWS=max(rows.tile_rows * padded, 16), num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def prefill_tile_rows(heads: int, kv_heads: int) -> int:
    """Rows of a prefill tile: with all heads of a group they fill 64 rows of a product."""
    return max(1, 64 // triton.next_power_of_2(heads // kv_heads))
