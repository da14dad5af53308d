"""Rows that may be what kills: they go on alone, one part at a time, in halves at each further death."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

QUARANTINE_DEATHS, POISON_DEATHS = 2, 4
"""Rows outstanding at two deaths may be their cause: they go on alone, and in halves at each further death. A lone row
outstanding at four deaths is ended with an error, so that it kills no more: the first two may have been one event that
struck both holders of an expert, so that it takes two more deaths, each while the row is alone, to convict it."""


class Part(NamedTuple):
    """Slots of a work that wait for their turn."""

    work: int
    slots: np.ndarray  # int64, ascending
    deaths: int


class Quarantine:
    """The parts that wait, and the dispatches (`out`, by seq) of the one that is out."""

    def __init__(self) -> None:
        self.out: set[int] = set()
        self._parts: deque[Part] = deque()

    def add(self, part: Part, top_k: int, *, halve: bool) -> int:
        """Put a part in, in two halves by rows or whole; returns how many parts it became."""
        rows = part.slots // top_k
        distinct = np.unique(rows)
        first = rows < (distinct[len(distinct) // 2] if halve else distinct[0])
        halves = [h for h in (part.slots[~first], part.slots[first]) if len(h)]
        for half in halves:  # the first half in front
            self._parts.appendleft(part._replace(slots=half))
        return len(halves)

    def passed_on(self, seq: int, heirs: Iterable[int]) -> bool:
        """A dispatch has ended, but for those that go on with it. Returns whether it was out of here."""
        if seq not in self.out:
            return False
        self.out.discard(seq)
        self.out.update(heirs)
        return True

    def release(self) -> Part | None:
        """The next part, unless one is out already: only one may be near the next death. Set `out` for it."""
        return self._parts.popleft() if self._parts and not self.out else None
