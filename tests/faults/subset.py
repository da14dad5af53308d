"""The part of the kill matrix that `make test` runs: `LIMIT` cells with as many pairs of two of (who, how, when) as
can be. There are more (how, when) pairs than that alone.

`python -m tests.faults.subset` computes it anew and writes `subset.txt`, which is committed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path

from tests.faults.matrix import POSSIBLE, Cell

PATH = Path(__file__).with_name("subset.txt")
ELSEWHERE = "launcher"
"""What takes the cluster with it: only in the whole matrix, and in tests of its own."""

LIMIT = 40

Pair = tuple[tuple[int, str], tuple[int, str]]


def read() -> list[Cell]:
    """The committed list."""
    return [Cell(*line.split(": ")) for line in PATH.read_text().splitlines()]


def pairs(cell: Cell) -> set[Pair]:
    """The three pairs of values in a cell."""
    return set(combinations(enumerate(cell), 2))


def coverage(chosen: Iterable[Cell]) -> tuple[int, int]:
    """How many pairs can occur, and how many of them are in these cells."""
    return len(set().union(*map(pairs, POSSIBLE))), len(set().union(*map(pairs, chosen)))


def cover(cells: Sequence[Cell], limit: int) -> list[Cell]:
    """Greedy: again and again the cell with the most pairs that no chosen one has, the first of several."""
    left = set().union(*map(pairs, cells))
    chosen: list[Cell] = []
    while left and len(chosen) < limit:
        best = max(cells, key=lambda c: len(pairs(c) & left))
        left -= pairs(best)
        chosen.append(best)
    return sorted(chosen, key=cells.index)


def chosen() -> list[Cell]:
    """What `subset.txt` should hold. etcd's few cells come first, so that all of their pairs with etcd are in it."""
    return cover(sorted((c for c in POSSIBLE if c.who != ELSEWHERE), key=lambda c: c.who != "etcd"), LIMIT)


if __name__ == "__main__":
    PATH.write_text("".join(f"{c.name}\n" for c in chosen()))
