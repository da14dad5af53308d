"""How many rows a product of this processor's matrix library may have for a row to keep its bits.

Libraries choose their loops by the number of rows: on AMD processors all choices give a row the same bits from 4 rows
on, on an Intel Xeon with AMX they do up to 12. So this is found out, once for each kind of product, before it is used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

MULTIPLE = 4
"""Products always have a multiple of so many rows: fewer give other bits everywhere."""
_PROBED = (*range(MULTIPLE, 65, MULTIPLE), 80, 96, 128, 192, 256, 384, 512)
PROBE_ROWS = _PROBED[-1]


def largest_block(agrees: Callable[[int], bool]) -> int:
    """The most rows that one product may have, a multiple of `MULTIPLE`; `sys.maxsize` where none is too many.

    `agrees(n)` says whether the first n of `PROBE_ROWS` rows have the bits that they have in products of `MULTIPLE`.
    """
    before = MULTIPLE
    for n in _PROBED:
        if not agrees(n):
            return before
        before = n
    return sys.maxsize
