"""Paged attention: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import random

import pytest
import torch

from kernels import reference
from kernels.triton_attention import (
    PAGE_KEYS,
    SPLIT_KEYS,
    DecodeScratch,
    PagedRows,
    paged_attention,
    prefill_tile_rows,
)
from tests.interpreter import DEVICE

GPU = DEVICE == "cuda"
HEADS, KV_HEADS, DIM = (32, 4, 128) if GPU else (4, 2, 16)
# The interpreter truncates to bf16 where a GPU rounds.
TOLERANCE = 6e-3 if GPU else 1.2e-2


class Paged:
    """Sequences of given lengths in scattered pages of a cache that is poisoned elsewhere with large numbers."""

    def __init__(self, lengths, heads=HEADS, kv_heads=KV_HEADS, dim=DIM, dtype=torch.bfloat16, seed=0):
        generator = torch.Generator().manual_seed(seed)
        pages = [-(-length // PAGE_KEYS) for length in lengths]
        order = random.Random(seed).sample(range(sum(pages)), sum(pages))
        self.tables = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
        for i, n in enumerate(pages):
            self.tables[i, :n] = torch.tensor(order[sum(pages[:i]) : sum(pages[: i + 1])])
        cache = torch.randn(sum(pages), 2, kv_heads, PAGE_KEYS, dim, generator=generator)
        self.cache = cache.to(DEVICE, dtype)
        self.queries = [torch.randn(n, heads, dim, generator=generator).to(DEVICE, dtype) for n in lengths]
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim

    def rows(self, chunks, tile_rows=None):
        """(queries, PagedRows) of these (sequence, start, length)."""
        tile_rows = tile_rows or prefill_tile_rows(self.heads, self.kv_heads)
        sequences = [s for s, _, n in chunks for _ in range(n)]
        positions = [p for _, start, n in chunks for p in range(start, start + n)]
        decodes, tiles, row = [], [], 0
        for _, _, n in chunks:
            if n == 1:
                decodes.append(row)
            else:
                tiles += [(row + t, min(tile_rows, n - t)) for t in range(0, n, tile_rows)]
            row += n
        splits = max(positions) // SPLIT_KEYS + 1
        ints = (self.tables.tolist(), sequences, positions, decodes, tiles)
        tables, seqs, pos, ones, many = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ints)
        query = torch.cat([self.queries[s][start : start + n] for s, start, n in chunks])
        return query, PagedRows(tables, seqs, pos, ones, many.view(-1, 2), tile_rows, splits)

    def attend(self, chunks, tile_rows=None):
        query, rows = self.rows(chunks, tile_rows)
        out = torch.full_like(query, float("nan"))
        scratch = DecodeScratch.empty(max(len(rows.decode_rows), 1), rows.splits, self.heads, self.dim, query.device)
        paged_attention(query, self.cache, rows, out, scratch)
        return out, reference.paged_attention(query, self.cache, rows.tables, rows.sequences, rows.positions)


def worst(got, expected):
    return float(((got.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


CHUNKS = [(0, 299, 1), (1, 0, 5), (2, 70, 3), (3, 600, 1), (4, 0, 1), (5, 255, 1), (6, 256, 1)]
LENGTHS = [300, 5, 73, 601, 1, 256, 257]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 2), (3, 3), (16, 1)])
def test_decode_and_prefill_rows_in_one_call(heads, kv_heads):
    got, expected = Paged(LENGTHS, heads, kv_heads, 32).attend(CHUNKS)
    assert worst(got, expected) < TOLERANCE


def test_chunks_at_every_kind_of_boundary():
    """Chunks that begin and end within, at and behind pages and splits."""
    paged = Paged([530])
    for start, length in ((0, 2), (60, 8), (64, 64), (250, 12), (256, 3), (500, 30)):
        got, expected = paged.attend([(0, start, length)])
        assert worst(got, expected) < TOLERANCE, (start, length)


@pytest.mark.parametrize("tile_rows", [2, 8, 16] if GPU else [8])
def test_decode_has_the_bits_of_prefill_at_every_position(tile_rows):
    """On a GPU. The interpreter's products depend on the tile, so there it is the values, at a few positions."""
    length = 1500 if GPU else 70
    paged = Paged([length])
    whole, _ = paged.attend([(0, 0, length)], tile_rows)
    positions = range(length) if GPU else (0, 63, 64, 69)
    different = []
    for p in positions:
        got = paged.attend([(0, p, 1)])[0][0]
        same = torch.equal(got, whole[p]) if GPU else worst(got, whole[p].double()) < 2 * TOLERANCE
        different += [] if same else [p]
    assert different == []


def test_bits_do_not_depend_on_chunks_and_company():
    lengths = [1100, 700, 300, 64, 40] if GPU else [270, 66]
    paged, rng = Paged(lengths), random.Random(1)
    alone = [torch.cat([paged.attend([(i, p, 1)])[0] for p in range(n)]) if GPU else paged.attend([(i, 0, n)])[0]
             for i, n in enumerate(lengths)]  # fmt: skip
    for _ in range(60 if GPU else 3):
        chunks = []
        for i in rng.sample(range(len(lengths)), rng.randint(1, len(lengths))):
            start = rng.randrange(lengths[i] - 2)
            least = 1 if GPU else 2
            chunks.append((i, start, rng.randint(least, min(130, lengths[i] - start))))
        got, _ = paged.attend(chunks)
        row = 0
        for i, start, n in chunks:
            assert torch.equal(got[row : row + n], alone[i][start : start + n]), (chunks, i)
            row += n


def test_what_lies_behind_a_sequence_is_not_read():
    paged = Paged([70, 300])
    chunks = [(0, 69, 1), (1, 100, 20)]
    before, _ = paged.attend(chunks)
    last = paged.tables[0, 1]
    paged.cache[last, :, :, 6:] = float("nan")  # positions from 70 on
    for page in paged.tables[1, 2:5]:
        paged.cache[page] = float("nan")  # positions from 128 on
    after, _ = paged.attend(chunks)
    assert torch.equal(after[0], before[0]) and torch.equal(after[1:21], before[1:21])


def test_shapes_that_are_not_supported_are_refused():
    paged = Paged([10], dim=48)
    with pytest.raises(ValueError, match="of 48 with pages of 64 keys are not supported"):
        paged.attend([(0, 0, 2)])
