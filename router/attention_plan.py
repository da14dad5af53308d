"""Which attention calls a micro-batch makes: worked out once per step, used by every layer.

Decode rows whose keys lie at regular distances in the cache share a call on one strided view; a prefill chunk has
calls of its own. Only a sequence whose blocks are not consecutive is gathered first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.attention import QUERY_MULTIPLE, padded_key_length
from router.kv_cache import BLOCK_SIZE

MAX_MASK_ELEMENTS = 1 << 22  # of one prefill call: 16 MiB


@dataclass(frozen=True)
class SequenceChunk:
    """Positions [start, start + length) of one sequence, computed now; its cache blocks cover them all."""

    block_table: list[int]
    start: int
    length: int


@dataclass(frozen=True)
class KeyView:
    """Where the keys of `count` sequences lie: from slot `first`, `step` slots apart; or gathered from `slots`."""

    count: int
    length: int  # padded number of keys
    first: int
    step: int
    slots: torch.Tensor | None = None  # int64 [length], only with count 1


@dataclass(frozen=True)
class DecodeCall:
    """One query row each of several sequences: rows [lo, hi) of the decode order. `mask` is [hi - lo, 1, 1, keys]."""

    lo: int
    hi: int
    keys: KeyView
    mask: torch.Tensor


@dataclass(frozen=True)
class PrefillCall:
    """Rows [lo, hi) of the micro-batch, one sequence's; `padded` rows are computed. `mask` is [1, 1, padded, keys]."""

    lo: int
    hi: int
    padded: int
    keys: KeyView
    mask: torch.Tensor


@dataclass(frozen=True)
class AttentionPlan:
    """The calls of one micro-batch. `slots` int64 [n]: where each row's key and value are written.

    `order` (int64) lists the micro-batch's rows in decode order; None when they are rows 0, 1, … as they stand.
    """

    slots: torch.Tensor
    decodes: list[DecodeCall]
    order: torch.Tensor | None
    prefills: list[PrefillCall]


def plan_attention(chunks: Sequence[SequenceChunk], head_dim: int) -> AttentionPlan:
    """The calls for the rows of `chunks`, in their order."""
    slots: list[int] = []
    decode_rows: list[tuple[KeyView, int, int]] = []  # keys, position, row
    prefills: list[PrefillCall] = []
    for chunk in chunks:
        row = len(slots)
        slots += chunk_slots(chunk)
        if chunk.length == 1:
            decode_rows.append((_key_view(chunk.block_table, chunk.start + 1, head_dim), chunk.start, row))
        else:
            prefills += _prefill_calls(chunk, row, head_dim)
    decode_rows.sort(key=lambda entry: (entry[0].slots is not None, entry[0].length, entry[0].first, entry[2]))
    order = [row for *_, row in decode_rows]
    decodes = [_decode_call(decode_rows, lo, hi) for lo, hi in _regular_runs([keys for keys, *_ in decode_rows])]
    in_place = order == list(range(len(order)))
    return AttentionPlan(torch.tensor(slots), decodes, None if in_place else torch.tensor(order), prefills)


def chunk_slots(chunk: SequenceChunk) -> list[int]:
    """The cache slots of the chunk's positions."""
    table = chunk.block_table
    positions = range(chunk.start, chunk.start + chunk.length)
    return [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in positions]


def _key_view(table: list[int], num_keys: int, head_dim: int) -> KeyView:
    length = padded_key_length(num_keys, head_dim)
    used = table[: -(-num_keys // BLOCK_SIZE)]
    first = used[0] * BLOCK_SIZE
    if used == list(range(used[0], used[0] + len(used))):
        return KeyView(1, length, first, 0)
    offsets = torch.arange(BLOCK_SIZE)
    slots = (torch.tensor(used)[:, None] * BLOCK_SIZE + offsets).flatten()[:length]
    return KeyView(1, length, first, 0, slots)


def _regular_runs(keys: list[KeyView]) -> list[tuple[int, int]]:
    """Split sorted views into runs [lo, hi) of one length and at equal distances."""
    runs: list[tuple[int, int]] = []
    lo = 0
    for i in range(1, len(keys) + 1):
        if i < len(keys) and _continues(keys, lo, i):
            continue
        runs.append((lo, i))
        lo = i
    return runs


def _continues(keys: list[KeyView], lo: int, i: int) -> bool:
    first, last, new = keys[lo], keys[i - 1], keys[i]
    if new.length != first.length or new.slots is not None or first.slots is not None:
        return False
    return i - lo < 2 or new.first - last.first == keys[lo + 1].first - first.first


def _decode_call(rows: list[tuple[KeyView, int, int]], lo: int, hi: int) -> DecodeCall:
    first = rows[lo][0]
    step = rows[lo + 1][0].first - first.first if hi - lo > 1 else 0
    positions = torch.tensor([position for _, position, _ in rows[lo:hi]])
    mask = _causal_mask(positions, first.length)[:, None, None]
    return DecodeCall(lo, hi, KeyView(hi - lo, first.length, first.first, step, first.slots), mask)


def _prefill_calls(chunk: SequenceChunk, row: int, head_dim: int) -> list[PrefillCall]:
    """One call, or several where the mask would grow too large."""
    longest = padded_key_length(chunk.start + chunk.length, head_dim)
    step = max(QUERY_MULTIPLE, MAX_MASK_ELEMENTS // longest // QUERY_MULTIPLE * QUERY_MULTIPLE)
    calls = []
    for offset in range(0, chunk.length, step):
        length = min(step, chunk.length - offset)
        start = chunk.start + offset
        padded = length + -length % QUERY_MULTIPLE
        keys = _key_view(chunk.block_table, start + length, head_dim)
        positions = torch.arange(start, start + padded)  # those behind the chunk are padding, dropped afterwards
        mask = _causal_mask(positions, keys.length)[None, None]
        calls.append(PrefillCall(row + offset, row + offset + length, padded, keys, mask))
    return calls


def _causal_mask(positions: torch.Tensor, length: int) -> torch.Tensor:
    """[rows, length]: 0 for the keys that a row at its position sees, -inf for the others."""
    hidden = torch.arange(length) > positions[:, None]
    return torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
