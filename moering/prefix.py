"""Names of prompt prefixes: equal names mean equal tokens from the start of the sequence to the end of a block.

Routers name what their KV caches hold, gateways what they sent where; they need the same names.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence

BLOCK_TOKENS = 512
"""Tokens of a KV block of a router on a CPU. One on a GPU caches smaller blocks; a gateway always goes by this many."""
_KEY_BYTES = 16


def prefix_keys(tokens: Sequence[int], block_tokens: int = BLOCK_TOKENS, known: Sequence[bytes] = ()) -> list[bytes]:
    """One key for each full block of `tokens`: the hash of the key before it and the block's token ids.

    `known` are keys of the first blocks, computed earlier.
    """
    keys = list(known)
    for end in range((len(keys) + 1) * block_tokens, len(tokens) + 1, block_tokens):
        ids = array("I", tokens[end - block_tokens : end])
        if sys.byteorder == "big":
            ids.byteswap()
        keys.append(hashlib.blake2b((keys[-1] if keys else b"") + ids.tobytes(), digest_size=_KEY_BYTES).digest())
    return keys
