"""Batch-invariant attention on a CPU: `scaled_dot_product_attention` kept to the shapes at which its bits agree.

PyTorch's CPU kernel walks the keys in blocks of 512. A query row gets the same bits in decode, in prefill chunks and
in a batch when (1) every product has at least 4 query rows, and no more than `kernels.row_blocks` allows, and (2) the
key length is padded, under an additive mask, so that the last block's product with the values splits its sum as a full
block does. A full block always qualifies; which shorter tails do depends on the matrix library, so `key_tails` probes
them.
"""

from __future__ import annotations

import functools
from bisect import bisect_left

import torch

from kernels.row_blocks import MULTIPLE, PROBE_ROWS, largest_block

# what `scaled_dot_product_attention` calls; named, because its choice of another kernel would change the bits
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

KEY_BLOCK = 512
QUERY_MULTIPLE = MULTIPLE
_TAIL_STEP = 64
_PROBE_QUERIES = (4, 8, 32, 64, 256)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Softmax attention, scaled by 1/sqrt(head_dim).

    query [b, h, m, d] with m a multiple of 4, key and value [b, h, n, d] (any strides but the last) with n from
    `padded_key_length`; `mask` additive, broadcast to [b, 1, m, n], 0 or -inf, and 0 for key 0. Returns [b, h, m, d].
    """
    rows, block = query.shape[2], query_block(query.shape[3])
    expanded = mask.expand(-1, -1, rows, -1)
    if rows <= block:
        return _attend(query, key, value, expanded)
    parts = zip(query.split(block, 2), expanded.split(block, 2), strict=True)
    return torch.cat([_attend(q, key, value, m) for q, m in parts], 2)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return _FLASH(query, key, value, 0.0, False, attn_mask=mask)[0]


@functools.cache
def query_block(head_dim: int) -> int:
    """The most query rows of one call."""
    generator = torch.Generator().manual_seed(head_dim)
    key, value = torch.randn(2, 1, 1, 2 * KEY_BLOCK, head_dim, generator=generator)
    query = torch.randn(1, 1, PROBE_ROWS, head_dim, generator=generator)
    mask = torch.zeros(1, 1, PROBE_ROWS, 2 * KEY_BLOCK)
    fours = [_attend(q, key, value, mask[:, :, :MULTIPLE]) for q in query.split(MULTIPLE, 2)]
    alone = torch.cat(fours, 2)

    def agrees(n: int) -> bool:
        return torch.equal(_attend(query[:, :, :n], key, value, mask[:, :, :n]), alone[:, :, :n])

    return largest_block(agrees)


def padded_key_length(keys: int, head_dim: int) -> int:
    """The smallest key length ≥ `keys` at which the bits are those of whole blocks."""
    tails = key_tails(head_dim)
    full, rest = divmod(keys, KEY_BLOCK)
    return full * KEY_BLOCK + (tails[bisect_left(tails, rest)] if rest else 0)


@functools.cache
def key_tails(head_dim: int) -> tuple[int, ...]:
    """The tail lengths, ascending and ending with 512, that give this machine's bits of a full block."""
    generator = torch.Generator().manual_seed(head_dim)
    candidates = range(_TAIL_STEP, KEY_BLOCK, _TAIL_STEP)
    good = tuple(tail for tail in candidates if _tail_agrees(tail, head_dim, generator))
    return (*good, KEY_BLOCK)


def _tail_agrees(tail: int, head_dim: int, generator: torch.Generator) -> bool:
    """True when `tail` keys give the bits of 512 keys of which the rest is masked; also after a full block."""
    heads = 2
    for before in (0, KEY_BLOCK):
        key, value = torch.randn(2, 1, heads, before + KEY_BLOCK, head_dim, generator=generator)
        short = before + tail
        for queries in _PROBE_QUERIES:
            query = torch.randn(1, heads, queries, head_dim, generator=generator)
            # row i sees all keys but the last i mod 64 of the tail
            visible = short - torch.arange(queries) % _TAIL_STEP
            hidden = torch.arange(before + KEY_BLOCK) >= visible[:, None]
            mask = torch.zeros(1, 1, queries, before + KEY_BLOCK).masked_fill_(hidden, float("-inf"))
            whole = attend(query, key, value, mask)
            if not torch.equal(whole, attend(query, key[:, :, :short], value[:, :, :short], mask[..., :short])):
                return False
    return True
